# Stops before the work that would fill up the disk, not in the middle of it.

# `what` needs `megabytes` in `folder`; the folder need not exist yet.
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
    message(FATAL_ERROR "Not enough disk space: ${what} needs ${megabytes} MB in ${folder}, but only ${free} MB are free. "
                        "Free some space, or build in a folder on another disk.")
  endif()
endfunction()
