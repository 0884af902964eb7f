# Part of `cmake --install build`: installs the wheel into the environment of ORCHD_PYTHON, unless it is there already.

include("${ORCHD_SETTINGS}")
include("${CMAKE_CURRENT_LIST_DIR}/disk.cmake")

set(print_paths "import sys, sysconfig; print(sys.prefix, sysconfig.get_path('platlib'), sep=';')")
execute_process(COMMAND "${ORCHD_PYTHON}" -c "${print_paths}"
                OUTPUT_VARIABLE paths OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
list(GET paths 0 prefix)
list(GET paths 1 site_packages)

# pip cannot tell two builds of one version apart, so a stamp file records which one is installed.
set(stamp "${prefix}/.orchd-wheel-key")
set(installed "")
if(EXISTS "${stamp}" AND EXISTS "${site_packages}/llama_cpp_python-${ORCHD_LLAMA_VERSION}.dist-info")
  file(READ "${stamp}" installed)
endif()
if(NOT installed STREQUAL ORCHD_WHEEL_KEY)
  if(ORCHD_CUDA_RUNTIME)
    # Into the environment, where llama.cpp's CUDA backend looks for them (llama_rpath.cmake): 0.6 GB that every wheel in
    # the cache would otherwise contain, and that other packages can share.
    orchd_check_disk("${site_packages}" 1300 "cuBLAS and the CUDA runtime")
    execute_process(COMMAND "${ORCHD_PYTHON}" -m pip --disable-pip-version-check install --quiet --no-deps
                            --require-hashes --find-links "${ORCHD_BUILD_DIR}/cuda-wheels"
                            --requirement "${ORCHD_CUDA_RUNTIME}"
                    COMMAND_ERROR_IS_FATAL ANY)
  endif()
  file(GLOB wheel "${ORCHD_WHEEL_DIR}/*.whl")
  file(REMOVE "${stamp}")
  execute_process(COMMAND "${ORCHD_PYTHON}" -m pip install --quiet --no-deps --force-reinstall "${wheel}"
                  COMMAND_ERROR_IS_FATAL ANY)
  file(WRITE "${prefix}/.orchd-wheel.txt" "${ORCHD_WHEEL_KEY_TEXT}\n")  # for `orchd.cli.versions.built_architectures`
  file(WRITE "${stamp}" "${ORCHD_WHEEL_KEY}")
endif()
