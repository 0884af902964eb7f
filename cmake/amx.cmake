# Sets in the caller: `out_args`, arguments for llama.cpp's configure step that disable AMX; empty if this machine has
# none, or if the compiler handles it correctly. See amx_probe.cpp.
function(orchd_check_amx out_args)
  set(${out_args} "" PARENT_SCOPE)
  set(probe "${CMAKE_BINARY_DIR}/amx_probe")
  execute_process(COMMAND "${CMAKE_CXX_COMPILER}" -O3 -march=native -o "${probe}"
                          "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/amx_probe.cpp"
                  OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE failed)
  if(failed)
    return()  # the compiler does not know x86-64's options, so this machine has no AMX either
  endif()
  execute_process(COMMAND "${probe}" OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE failed)
  if(failed)
    message(NOTICE "AMX: disabled, because ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} compiles it to illegal "
                   "instructions. To use a newer compiler: CC=gcc-14 CXX=g++-14 make setup")
    set(${out_args} "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8" PARENT_SCOPE)
  endif()
endfunction()
