# Which of this machine's vector instructions llama.cpp had better not use.

# Sets in the caller: `out_args`, arguments for llama.cpp's configure step; empty where it may use them all.
function(orchd_check_instructions out_args)
  set(flags "")

  # AMX, if the compiler gets it wrong: see amx_probe.cpp.
  set(probe "${CMAKE_BINARY_DIR}/amx_probe")
  execute_process(COMMAND "${CMAKE_CXX_COMPILER}" -O3 -march=native -o "${probe}"
                          "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/amx_probe.cpp"
                  OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed)  # else the compiler does not know x86-64's options, so this machine has neither
    execute_process(COMMAND "${probe}" OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE failed)
    if(failed)
      message(NOTICE "AMX: disabled, because ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} compiles it to illegal "
                     "instructions. To use a newer compiler: CC=gcc-14 CXX=g++-14 make setup")
      string(APPEND flags " -mno-amx-int8")
    endif()
  endif()

  # AVX512-FP16: with it, llama.cpp adds up attention's values 128 at a time, and what is left one by one
  # (ggml_vec_mad_f16 in ggml/src/ggml-cpu/vec.h). A head of 64 is left whole: after 1,000 tokens, such a model generates
  # half as fast as without.
  set(empty "${CMAKE_BINARY_DIR}/empty.cpp")
  file(WRITE "${empty}" "")
  execute_process(COMMAND "${CMAKE_CXX_COMPILER}" -march=native -dM -E "${empty}"
                  OUTPUT_VARIABLE macros ERROR_QUIET)
  if(macros MATCHES "__AVX512FP16__")
    string(APPEND flags " -mno-avx512fp16")
  endif()

  if(flags)
    string(STRIP "${flags}" flags)
    set(flags "\"-DCMAKE_C_FLAGS=${flags}\" \"-DCMAKE_CXX_FLAGS=${flags}\"")
  endif()
  set(${out_args} "${flags}" PARENT_SCOPE)
endfunction()
