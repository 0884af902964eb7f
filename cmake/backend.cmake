# Which backend llama.cpp is built with, and why.

include("${CMAKE_CURRENT_LIST_DIR}/cuda.cmake")

# Sets in the caller: `out_name`, for people; `out_args`, what llama.cpp's configure step gets; `out_cuda_version`,
# empty unless it is a CUDA build.
function(orchd_choose_backend out_name out_args out_cuda_version)
  if(NOT ORCHD_BACKEND MATCHES "^(auto|cpu|cuda)$")
    message(FATAL_ERROR "ORCHD_BACKEND is '${ORCHD_BACKEND}'; it can be auto, cpu or cuda.")
  endif()
  set(${out_name} "the CPU" PARENT_SCOPE)
  set(${out_args} "" PARENT_SCOPE)
  set(${out_cuda_version} "" PARENT_SCOPE)
  if(ORCHD_BACKEND STREQUAL "cpu")
    message(NOTICE "Backend: CPU, as asked for.")
    return()
  endif()

  orchd_find_gpus(driver gpu_names architectures gpu_trouble)
  orchd_find_cuda_toolkit(nvcc cuda_version toolkit_trouble)
  if(ORCHD_CUDA_ARCHITECTURES)
    set(architectures "${ORCHD_CUDA_ARCHITECTURES}")
  endif()

  set(obstacle "")
  if(ORCHD_BACKEND STREQUAL "auto" AND NOT driver)
    set(obstacle "${gpu_trouble}")
  elseif(NOT architectures)
    string(CONCAT obstacle "${gpu_trouble}. To build for a GPU all the same, name its compute capability: "
                           "-DORCHD_CUDA_ARCHITECTURES=86")
  elseif(NOT nvcc)
    string(CONCAT obstacle "${toolkit_trouble}. Install a whole toolkit (Debian and Ubuntu: apt install "
                           "nvidia-cuda-toolkit), or set CUDA_HOME to where one is")
  endif()

  if(NOT obstacle)
    if(NOT gpu_names)
      set(gpu_names "no GPU on this box")
    endif()
    list(JOIN architectures ", " architectures_text)
    list(JOIN gpu_names ", " gpu_names)
    message(NOTICE "Backend: CUDA ${cuda_version} for compute capability ${architectures_text} (${gpu_names}).")
    set(${out_name} "CUDA" PARENT_SCOPE)
    set(${out_args} "-DGGML_CUDA=ON -DCMAKE_CUDA_COMPILER=${nvcc} -DCMAKE_CUDA_ARCHITECTURES=${architectures}"
        PARENT_SCOPE)
    set(${out_cuda_version} "${cuda_version}" PARENT_SCOPE)
  elseif(ORCHD_BACKEND STREQUAL "cuda")
    message(FATAL_ERROR "Backend: CUDA was asked for, but ${obstacle}.")
  elseif(driver)
    message(WARNING "Backend: CPU, although this box has an NVIDIA driver, because ${obstacle}.")
  else()
    if(cuda_version)
      string(APPEND obstacle "; the CUDA ${cuda_version} toolkit that is here stays unused")
    endif()
    message(NOTICE "Backend: CPU, because ${obstacle}.")
  endif()
endfunction()
