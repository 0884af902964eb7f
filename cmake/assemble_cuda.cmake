# cmake -D ORCHD_SETTINGS=FILE -P assemble_cuda.cmake: unpacks the parts of a CUDA toolkit that this machine lacks from
# NVIDIA's wheels into ORCHD_CUDA_DIR, unless they are there already. Does nothing for a build that needs none of them.

cmake_minimum_required(VERSION 3.21)
include("${ORCHD_SETTINGS}")
include("${CMAKE_CURRENT_LIST_DIR}/disk.cmake")

if(ORCHD_CUDA_DIR AND NOT EXISTS "${ORCHD_CUDA_DIR}")
  orchd_check_disk("${ORCHD_BUILD_DIR}" 1500 "the CUDA toolkit")
  set(wheels "${ORCHD_BUILD_DIR}/cuda-wheels")
  set(requirements "")
  foreach(file IN LISTS ORCHD_CUDA_COMPILER ORCHD_CUDA_RUNTIME)
    list(APPEND requirements --requirement "${file}")
  endforeach()
  message(NOTICE "Fetching the missing parts of CUDA: 0.5 GB from PyPI")
  execute_process(COMMAND "${ORCHD_PYTHON}" -m pip --disable-pip-version-check download --quiet --no-deps
                          --require-hashes --only-binary :all: ${requirements} --dest "${wheels}"
                  RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "The parts of CUDA could not be fetched. Without a network, put the wheels that cmake/cuda*.txt "
                        "list into a folder and set PIP_NO_INDEX=1 and PIP_FIND_LINKS=FOLDER; or build for the CPU "
                        "with BACKEND=cpu.")
  endif()

  # Unpacked elsewhere and then moved, so that the folder exists only if it is complete.
  set(partial "${ORCHD_CUDA_DIR}.partial")
  file(REMOVE_RECURSE "${partial}")
  # The machine's own compiler must not find a second set of its headers.
  set(only "*.whl")
  if(NOT ORCHD_CUDA_COMPILER)
    set(only "nvidia_cublas*.whl")
  endif()
  file(GLOB found "${wheels}/${only}")
  foreach(wheel IN LISTS found)
    file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${partial}")
  endforeach()
  # Wheels cannot contain links: create the names that linkers look for, and the folder name that nvcc looks for.
  file(GLOB libraries "${partial}/nvidia/*/lib/lib*.so.*")
  foreach(library IN LISTS libraries)
    get_filename_component(name "${library}" NAME)
    get_filename_component(folder "${library}" DIRECTORY)
    string(REGEX REPLACE "\\.so\\..*" ".so" plain "${name}")
    file(CREATE_LINK "${name}" "${folder}/${plain}" SYMBOLIC)
  endforeach()
  file(GLOB homes "${partial}/nvidia/*/lib")
  foreach(home IN LISTS homes)
    get_filename_component(folder "${home}" DIRECTORY)
    file(CREATE_LINK lib "${folder}/lib64" SYMBOLIC)
  endforeach()
  file(RENAME "${partial}" "${ORCHD_CUDA_DIR}")
endif()
