# Everything that decides what is in the wheel, as text: two machines, or one machine at two times, may share a wheel
# exactly if this text is the same. The Python version is not in it, because the wheel is tagged py3-none.

function(orchd_wheel_key out)
  # llama.cpp compiles for the CPU it is built on (GGML_NATIVE). The macros that the compiler then defines show what it
  # makes of that CPU and, with <cstddef>, the versions of the C and C++ libraries. On ARM the option is -mcpu.
  set(native "")
  set(options -march=native -mcpu=native)
  if(ORCHD_PORTABLE)
    set(options -O2)  # of the versions alone
  endif()
  foreach(option IN LISTS options)
    execute_process(COMMAND "${CMAKE_CXX_COMPILER}" ${option} -include cstddef -dM -E -x c++ /dev/null
                    OUTPUT_VARIABLE macros ERROR_QUIET RESULT_VARIABLE failed)
    if(NOT failed)
      string(SHA256 native "${macros}")
      break()
    endif()
  endforeach()

  # The location of the clone does not affect the wheel.
  string(REPLACE "${CMAKE_BINARY_DIR}/" "build/" args "${ORCHD_LLAMA_ARGS}")
  string(REPLACE "${CMAKE_SOURCE_DIR}/" "" args "${args}")

  string(JOIN "\n" text
    "llama-cpp-python ${ORCHD_LLAMA_VERSION} sha256:${ORCHD_LLAMA_SHA256}"
    "CMAKE_ARGS ${args}"
    "C ${CMAKE_C_COMPILER_ID} ${CMAKE_C_COMPILER_VERSION} $ENV{CFLAGS}"
    "C++ ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} $ENV{CXXFLAGS}"
    "linker $ENV{LDFLAGS}"
    "${CMAKE_HOST_SYSTEM_NAME} ${CMAKE_HOST_SYSTEM_PROCESSOR}, native macros sha256:${native}"
    "without ${ORCHD_WHEEL_EXCLUDE}"
    ${ARGN})
  set(${out} "${text}" PARENT_SCOPE)
endfunction()
