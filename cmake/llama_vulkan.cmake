# Runs inside llama.cpp's own configure step, right after `project(ggml)`: gives the Vulkan backend what the machine's
# headers may lack.

function(orchd_add_older_headers)
  target_compile_options(ggml-vulkan PRIVATE -include "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/vulkan_older_headers.h")
endfunction()
# After everything else of that file: the target does not exist yet.
cmake_language(DEFER DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}" CALL orchd_add_older_headers)
