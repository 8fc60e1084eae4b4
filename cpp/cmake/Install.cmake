# What is installed: libraries, headers, and a config for find_package(clip_export).
include(CMakePackageConfigHelpers)

install(TARGETS clip_export_tokenizer clip_export_preprocess clip_export_runtime clip_export_c ${exported} EXPORT clip_export
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/clip_export DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

set(config_dir ${CMAKE_INSTALL_LIBDIR}/cmake/clip_export)
list(JOIN CLIP_EXPORT_DEPENDENCIES "\n" CLIP_EXPORT_DEPENDENCIES)
configure_package_config_file(cmake/clip_exportConfig.cmake.in clip_exportConfig.cmake INSTALL_DESTINATION ${config_dir})
write_basic_package_version_file(clip_exportConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(EXPORT clip_export NAMESPACE clip_export:: DESTINATION ${config_dir} FILE clip_exportTargets.cmake)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/clip_exportConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/clip_exportConfigVersion.cmake
        DESTINATION ${config_dir})
