# cmake -D ORCHD_SETTINGS=FILE -D ORCHD_PROGRAMS=NAMES -P build_peer.cmake: builds programs of llama.cpp's own into
# build/peer/bin, from the wheel's llama.cpp and with its flags. docs/benchmarks.md and `make test-architectures` use
# them; orchd does not need them.

cmake_minimum_required(VERSION 3.21)
include("${ORCHD_SETTINGS}")
include("${CMAKE_CURRENT_LIST_DIR}/fetch_source.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/assemble_cuda.cmake" OPTIONAL)

set(peer "${ORCHD_BUILD_DIR}/peer")
set(log "${ORCHD_BUILD_DIR}/peer.log")
separate_arguments(programs UNIX_COMMAND "${ORCHD_PROGRAMS}")

# If it was built for another wheel, options that are no longer set would still be in its cache.
set(stamp "${peer}/wheel-key")
set(built_for "")
if(EXISTS "${stamp}")
  file(READ "${stamp}" built_for)
endif()
if(NOT built_for STREQUAL ORCHD_WHEEL_KEY)
  file(REMOVE_RECURSE "${peer}")
endif()

separate_arguments(flags UNIX_COMMAND "${ORCHD_LLAMA_ARGS}")
# One shared library for each part as in the wheel, and none of what the wheel does not need either: network downloads,
# examples, the web page. Of the tests only what is asked for is compiled.
list(APPEND flags -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
                  -DLLAMA_BUILD_TESTS=ON -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF)
execute_process(
  COMMAND "${CMAKE_COMMAND}" -S "${ORCHD_LLAMA_SOURCE}/vendor/llama.cpp" -B "${peer}" -G Ninja
          "-DCMAKE_C_COMPILER=${ORCHD_C_COMPILER}" "-DCMAKE_CXX_COMPILER=${ORCHD_CXX_COMPILER}" ${flags}
  OUTPUT_FILE "${log}" ERROR_FILE "${log}" RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "llama.cpp's configure step failed; see ${log}.")
endif()
file(WRITE "${stamp}" "${ORCHD_WHEEL_KEY}")

message(NOTICE "Compiling ${programs} with ${flags}; the first time takes a few minutes. Full log: ${log}")
execute_process(
  COMMAND sh -c "exec \"$@\" 2>&1" sh
          "${CMAKE_COMMAND}" -E env "NINJA_STATUS=[%f/%t %e s] "
          "${CMAKE_COMMAND}" --build "${peer}" --target ${programs}
  COMMAND tee -a "${log}"
  COMMAND grep --line-buffered -E "^ *\\[[0-9]+/[0-9]+ |[Ee]rror: |ERROR|CMake Error"
  RESULTS_VARIABLE results)
list(GET results 0 failed)
if(failed)
  message(FATAL_ERROR "llama.cpp's programs could not be built; see ${log}. After fixing the cause, run the same command "
                      "again; it continues where it stopped.")
endif()
