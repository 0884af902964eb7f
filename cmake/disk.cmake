# Stops before a disk fills up, instead of in the middle.

# `what` needs `megabytes` in `folder`; the folder need not be there yet.
function(orchd_check_disk folder megabytes what)
  while(NOT EXISTS "${folder}")
    get_filename_component(folder "${folder}" DIRECTORY)
  endwhile()
  execute_process(COMMAND df -Pk "${folder}" OUTPUT_VARIABLE answer ERROR_QUIET RESULT_VARIABLE failed)
  # Filesystem, blocks, used, available, ...
  if(failed OR NOT answer MATCHES "\n[^\n]* +[0-9]+ +[0-9]+ +([0-9]+) +[0-9]+%")
    return()
  endif()
  math(EXPR free "${CMAKE_MATCH_1} / 1024")
  if(free LESS megabytes)
    message(FATAL_ERROR "Out of disk: ${what} needs ${megabytes} MB in ${folder}, and ${free} MB are free. Make room, or "
                        "build in a folder on another disk.")
  endif()
endfunction()
