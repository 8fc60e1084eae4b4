# What `python -m clip_export --cmakedir` names: find_package(clip_export) by it builds the sources that the Python package
# carries, as a part of the project that asks. A library that was installed has a config of its own.
if(NOT TARGET clip_export::runtime)
  get_filename_component(clip_export_sources ${CMAKE_CURRENT_LIST_DIR}/../.. REALPATH)
  add_subdirectory(${clip_export_sources} ${CMAKE_BINARY_DIR}/clip_export EXCLUDE_FROM_ALL)
endif()
