# cmake -D ORCHD_SETTINGS=FILE -P build_wheel.cmake: builds the wheel into ORCHD_WHEEL_DIR, unless it is there already.

cmake_minimum_required(VERSION 3.21)
include("${ORCHD_SETTINGS}")

file(GLOB wheel "${ORCHD_WHEEL_DIR}/*.whl")
if(wheel)
  message(NOTICE "Already built: ${wheel}")
  return()
endif()
include("${CMAKE_CURRENT_LIST_DIR}/disk.cmake")
set(how_long "For the CPU this takes about 5 minutes on 2 cores.")
if(ORCHD_LLAMA_ARGS MATCHES "GGML_CUDA=ON")
  orchd_check_disk("${ORCHD_BUILD_DIR}" 3000 "building llama.cpp for CUDA")
  set(how_long "For CUDA this takes about half an hour on 2 cores per compute capability, and 2 GB of memory per core.")
elseif(ORCHD_LLAMA_ARGS MATCHES "GGML_VULKAN=ON")
  orchd_check_disk("${ORCHD_BUILD_DIR}" 1500 "building llama.cpp for Vulkan")
  set(how_long "For Vulkan this takes about 15 minutes on 2 cores.")
endif()
if(ORCHD_LLAMA_ARGS MATCHES "ALL_VARIANTS=ON")
  set(how_long "With all kinds of CPU this takes about half an hour on 2 cores.")
endif()
include("${CMAKE_CURRENT_LIST_DIR}/fetch_source.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/assemble_cuda.cmake")

set(log "${ORCHD_BUILD_DIR}/llama_cpp_python.log")
# Object files survive an interrupted build here, and the next attempt continues from them.
set(objects "${ORCHD_BUILD_DIR}/objects-${ORCHD_WHEEL_KEY}")
set(finished "${ORCHD_BUILD_DIR}/wheel-${ORCHD_WHEEL_KEY}")
# llama-cpp-python also installs its libraries into its own source folder and packs everything in there: without this, a
# CPU wheel would contain the libraries of an earlier CUDA build.
file(REMOVE_RECURSE "${ORCHD_LLAMA_SOURCE}/llama_cpp/lib")

message(NOTICE "Compiling llama.cpp with ${ORCHD_LLAMA_ARGS}\n"
               "${how_long} Full log: ${log}")
# From the folder, not by name: for a name, pip would take any wheel from its cache, whatever CMAKE_ARGS it was built
# with. pip writes a package's own output to stderr, hence the shell. CMAKE_EXECUTABLE, because the `cmake` on PATH is a
# Python script that does not run inside pip's build environment.
execute_process(
  COMMAND sh -c "exec \"$@\" 2>&1" sh
          "${CMAKE_COMMAND}" -E env "CC=${ORCHD_C_COMPILER}" "CXX=${ORCHD_CXX_COMPILER}"
          "CMAKE_ARGS=${ORCHD_LLAMA_ARGS}" "CMAKE_EXECUTABLE=${CMAKE_COMMAND}" CMAKE_GENERATOR=Ninja
          "NINJA_STATUS=[%f/%t %e s] "
          "${ORCHD_PYTHON}" -m pip wheel --verbose --no-deps --wheel-dir "${finished}"
          -C cmake.verbose=false -C "build-dir=${objects}" -C "wheel.exclude=${ORCHD_WHEEL_EXCLUDE}"
          "${ORCHD_LLAMA_SOURCE}"
  COMMAND tee "${log}"
  COMMAND "${ORCHD_PYTHON}" "${CMAKE_CURRENT_LIST_DIR}/progress.py"
  RESULTS_VARIABLE results)
list(GET results 0 failed)
if(failed)
  message(FATAL_ERROR "llama.cpp could not be built; see ${log}. After fixing the cause, run the same command again; it "
                      "continues where it stopped.")
endif()

# Copied into the cache under another name and then moved, so that no other build sees an incomplete wheel.
string(RANDOM suffix)
set(partial "${ORCHD_WHEEL_DIR}.${suffix}.partial")
file(COPY "${finished}/" DESTINATION "${partial}")
file(WRITE "${partial}/key.txt" "${ORCHD_WHEEL_KEY_TEXT}\n")
file(RENAME "${partial}" "${ORCHD_WHEEL_DIR}" RESULT failed)
if(failed)
  # Another clone finished the same wheel meanwhile.
  file(REMOVE_RECURSE "${partial}")
endif()
file(REMOVE_RECURSE "${objects}" "${finished}")
