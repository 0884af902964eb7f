# Runs inside llama.cpp's own configure step, right after `project(llama_cpp)`: there the CUDA backend's runtime path is
# set, because llama-cpp-python sets it to $ORIGIN alone and adds the folders it linked from, which may be gone by then.
#
# ORCHD_CUDA_RPATH: folders, absolute, or relative to the environment's site-packages.

function(orchd_set_rpath)
  set(rpath "$ORIGIN")
  foreach(folder IN LISTS ORCHD_CUDA_RPATH)
    if(NOT IS_ABSOLUTE "${folder}")
      set(folder "$ORIGIN/../../${folder}")
    endif()
    list(APPEND rpath "${folder}")
  endforeach()
  set_target_properties(ggml-cuda PROPERTIES INSTALL_RPATH "${rpath}" INSTALL_RPATH_USE_LINK_PATH OFF
                                             BUILD_WITH_INSTALL_RPATH ON)
endfunction()
# After everything else of that file, or llama-cpp-python's own setting would come later.
cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL orchd_set_rpath)
