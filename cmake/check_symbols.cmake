# cmake -DNM=<nm> "-DOBJECTS=<a.o>,<b.o>" -P check_symbols.cmake
#
# The kernels are compiled once per instruction set. A weak symbol (an inline function or template of a library) in two
# of those objects is merged by the linker, which may keep the AVX-512 copy for all: a crash on a machine without it.
string(REPLACE "," ";" objects "${OBJECTS}")
foreach(object IN LISTS objects)
  execute_process(COMMAND "${NM}" -C --defined-only "${object}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" shared "${symbols}")
  if(shared)
    list(JOIN shared "\n  " shared)
    message(FATAL_ERROR "${object} defines symbols that other instruction sets could be linked to:\n  ${shared}")
  endif()
endforeach()
