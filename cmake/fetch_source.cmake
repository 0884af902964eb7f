# cmake -D ORCHD_SETTINGS=FILE -P fetch_source.cmake: fetches, checks and unpacks the pinned source distribution.

cmake_minimum_required(VERSION 3.21)
include("${ORCHD_SETTINGS}")

if(NOT EXISTS "${ORCHD_LLAMA_SOURCE}")
  set(sdist "${ORCHD_LLAMA_SOURCE}.tar.gz")
  if(NOT EXISTS "${sdist}")
    message(NOTICE "Fetching the source of llama-cpp-python ${ORCHD_LLAMA_VERSION} (77 MB)")
    # pip checks the hash before it runs anything in the archive.
    set(requirement "${ORCHD_BUILD_DIR}/llama_cpp_python.txt")
    file(WRITE "${requirement}" "llama-cpp-python==${ORCHD_LLAMA_VERSION} --hash=sha256:${ORCHD_LLAMA_SHA256}\n")
    execute_process(COMMAND "${CMAKE_COMMAND}" -E env "CMAKE_EXECUTABLE=${CMAKE_COMMAND}"
                            "${ORCHD_PYTHON}" -m pip download --no-deps --no-binary llama-cpp-python --require-hashes
                            --requirement "${requirement}" --dest "${ORCHD_BUILD_DIR}"
                    COMMAND_ERROR_IS_FATAL ANY)
  endif()
  file(SHA256 "${sdist}" sha256)
  if(NOT sha256 STREQUAL ORCHD_LLAMA_SHA256)
    message(FATAL_ERROR "${sdist} has the SHA-256 ${sha256}, but ${ORCHD_LLAMA_SHA256} was expected. Delete the file and "
                        "try again.")
  endif()
  # Unpacked elsewhere and then moved, so that the folder exists only if it is complete.
  set(partial "${ORCHD_BUILD_DIR}/unpacked.partial")
  file(REMOVE_RECURSE "${partial}")
  file(ARCHIVE_EXTRACT INPUT "${sdist}" DESTINATION "${partial}")
  file(RENAME "${partial}/llama_cpp_python-${ORCHD_LLAMA_VERSION}" "${ORCHD_LLAMA_SOURCE}")
  file(REMOVE_RECURSE "${partial}")
endif()
