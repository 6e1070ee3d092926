// What the Python modules share: problems are structs whose fields Python sets by name.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

namespace ubp {

using Address = uintptr_t;

// Made from keywords; fields that are not named are 0. Tensors and None become pointers, numbers enumerators.
template <class Problem>
class Struct {
 public:
  Struct(pybind11::module_& module, const char* name) : class_(module, name, pybind11::module_local()) {
    class_.def(pybind11::init([](const pybind11::kwargs& fields) {
      Problem problem{};
      const pybind11::object made = pybind11::cast(&problem, pybind11::return_value_policy::reference);
      for (const auto& [field, value] : fields) {
        if (value.is_none()) continue;
        const bool is_number = PyLong_Check(value.ptr()) || PyFloat_Check(value.ptr());
        pybind11::setattr(made, field, is_number ? value : pybind11::object(value.attr("data_ptr")()));
      }
      return problem;
    }));
  }

  template <class T>
  Struct& field(const char* name, T Problem::* member) {
    if constexpr (std::is_pointer_v<T>)
      class_.def_property(
          name, [member](const Problem& problem) { return reinterpret_cast<Address>(problem.*member); },
          [member](Problem& problem, Address address) { problem.*member = reinterpret_cast<T>(address); });
    else if constexpr (std::is_enum_v<T>)
      class_.def_property(
          name, [member](const Problem& problem) { return static_cast<int>(problem.*member); },
          [member](Problem& problem, int number) { problem.*member = static_cast<T>(number); });
    else
      class_.def_readwrite(name, member);
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
  pybind11::class_<Problem> class_;
};

}  // namespace ubp
