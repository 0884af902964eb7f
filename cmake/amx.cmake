# Sets in the caller: `out_args`, what llama.cpp's configure step gets so that it leaves AMX alone; empty where this
# machine has none, or the compiler can be trusted with it. See amx_probe.cpp.
function(orchd_check_amx out_args)
  set(${out_args} "" PARENT_SCOPE)
  set(probe "${CMAKE_BINARY_DIR}/amx_probe")
  execute_process(COMMAND "${CMAKE_CXX_COMPILER}" -O3 -march=native -o "${probe}"
                          "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/amx_probe.cpp"
                  OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE failed)
  if(failed)
    return()  # not a compiler that knows x86-64's options, so not a machine with AMX either
  endif()
  execute_process(COMMAND "${probe}" OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE failed)
  if(failed)
    message(NOTICE "AMX: left out, because ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} makes illegal "
                   "instructions of it. A newer compiler may be named: CC=gcc-14 CXX=g++-14 make setup")
    set(${out_args} "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8" PARENT_SCOPE)
  endif()
endfunction()
