# Part of `cmake --install build`: the wheel into the environment of ORCHD_PYTHON, unless it is there already.

include("${ORCHD_SETTINGS}")

set(print_paths "import sys, sysconfig; print(sys.prefix, sysconfig.get_path('platlib'), sep=';')")
execute_process(COMMAND "${ORCHD_PYTHON}" -c "${print_paths}"
                OUTPUT_VARIABLE paths OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
list(GET paths 0 prefix)
list(GET paths 1 site_packages)

# pip sees no difference between two builds of one version, so what is installed is written down beside it.
set(stamp "${prefix}/.orchd-wheel-key")
set(installed "")
if(EXISTS "${stamp}" AND EXISTS "${site_packages}/llama_cpp_python-${ORCHD_LLAMA_VERSION}.dist-info")
  file(READ "${stamp}" installed)
endif()
if(NOT installed STREQUAL ORCHD_WHEEL_KEY)
  file(GLOB wheel "${ORCHD_WHEEL_DIR}/*.whl")
  file(REMOVE "${stamp}")
  execute_process(COMMAND "${ORCHD_PYTHON}" -m pip install --quiet --no-deps --force-reinstall "${wheel}"
                  COMMAND_ERROR_IS_FATAL ANY)
  file(WRITE "${stamp}" "${ORCHD_WHEEL_KEY}")
endif()
