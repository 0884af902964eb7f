# A llama.cpp for machines that have no compiler: its CPU backend once for each kind of CPU, as libraries of their own. At the
# start, ggml asks each whether it runs here and takes the best (engines/llamacpp/native/library.py).

# Sets in the caller: `out_args`, arguments for llama.cpp's configure step; `out_exclude`, patterns for what is left out of
# the wheel besides.
function(orchd_portable out_args out_exclude)
  if(ORCHD_BACKEND STREQUAL "cuda")
    # One library for the CPU, which has little to do beside a GPU: for all that have AVX2, FMA and F16C.
    set(${out_args} "-DGGML_NATIVE=OFF" PARENT_SCOPE)
    set(${out_exclude} "" PARENT_SCOPE)
    return()
  elseif(NOT ORCHD_BACKEND STREQUAL "cpu")
    message(FATAL_ERROR "A portable build is for the CPU or for CUDA: set -DORCHD_BACKEND=cpu or cuda.")
  endif()
  # Beside the other libraries, where they find each other and ggml looks for them. A wheel has no links, so each would be
  # there three times, by the names with versions too.
  set(args "-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DCMAKE_INSTALL_BINDIR=llama_cpp/lib "
           "-DCMAKE_INSTALL_RPATH=$ORIGIN")
  set(exclude ";/llama_cpp/lib/libggml-cpu-*.so.*")
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14)
    # See amx_probe.cpp. Such CPUs get the best of the others.
    message(NOTICE "AMX: left out, because GNU ${CMAKE_CXX_COMPILER_VERSION} may compile it to illegal instructions. To use "
                   "a newer compiler: CC=gcc-14 CXX=g++-14 make wheelhouse")
    string(APPEND exclude ";/llama_cpp/lib/libggml-cpu-sapphirerapids.so")
  endif()
  string(JOIN "" args ${args})
  set(${out_args} "${args}" PARENT_SCOPE)
  set(${out_exclude} "${exclude}" PARENT_SCOPE)
endfunction()
