// What the Python modules share: problems are structs whose fields Python sets by name.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace ubp {

using Address = uintptr_t;

// Made from keywords; fields that are not named are 0. Tensors, addresses and None become pointers, numbers
// enumerators. A call has some 25 fields: names are compared as the interned objects that they are, and no
// attribute is looked up but the address of a tensor.
template <class Problem>
class Struct {
 public:
  Struct(pybind11::module_& module, const char* name) {
    pybind11::class_<Problem>(module, name, pybind11::module_local())
        .def(pybind11::init([name = std::string(name)](const pybind11::kwargs& given) {
          Problem problem{};
          for (const auto& [field, value] : given)
            if (!value.is_none()) setter_of(name, field)(problem, value);
          return problem;
        }));
  }

  template <class T>
  Struct& field(const char* name, T Problem::* member) {
    known().emplace_back(PyUnicode_InternFromString(name),
                         [member](Problem& problem, pybind11::handle value) {
                           if constexpr (std::is_pointer_v<T>)
                             problem.*member = reinterpret_cast<T>(address_of(value));
                           else if constexpr (std::is_enum_v<T>)
                             problem.*member = static_cast<T>(value.cast<int>());
                           else
                             problem.*member = value.cast<T>();
                         });
    return *this;
  }

  // Names and members in turns.
  template <class T, class... Rest>
  Struct& fields(const char* name, T Problem::* member, Rest... rest) {
    field(name, member);
    if constexpr (sizeof...(rest) > 0) fields(rest...);
    return *this;
  }

 private:
  using Setter = std::function<void(Problem&, pybind11::handle)>;

  // As long as the process lives: names belong to Python, which may have ended before.
  static std::vector<std::pair<pybind11::handle, Setter>>& known() {
    static auto* all = new std::vector<std::pair<pybind11::handle, Setter>>;
    return *all;
  }

  static const Setter& setter_of(const std::string& type, pybind11::handle field) {
    for (const auto& [name, setter] : known())
      if (name.is(field)) return setter;
    for (const auto& [name, setter] : known())
      if (name.equal(field)) return setter;
    throw pybind11::attribute_error(type + " has no field " + std::string(pybind11::str(field)));
  }

  static Address address_of(pybind11::handle value) {
    if (PyLong_Check(value.ptr())) return value.cast<Address>();
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    const auto found =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_CallMethodNoArgs(value.ptr(), name));
    if (!found) throw pybind11::error_already_set();
    return found.template cast<Address>();
  }
};

}  // namespace ubp
