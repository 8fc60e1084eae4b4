# Finds what each backend needs, adds it to `runtime`, and says what was left out.

set(CLIP_EXPORT_BACKENDS "")
set(CLIP_EXPORT_DEPENDENCIES "") # what the installed config has to find again

# found(<BACKEND> <name> <source> <target> <version>) or left_out(<BACKEND> <name> <reason>)
function(clip_export_found option name source target version)
  target_sources(clip_export_runtime PRIVATE ${source})
  target_link_libraries(clip_export_runtime PRIVATE ${target})
  target_compile_definitions(clip_export_runtime PRIVATE CLIP_EXPORT_HAS_${option})
  list(APPEND CLIP_EXPORT_BACKENDS ${name})
  set(CLIP_EXPORT_BACKENDS ${CLIP_EXPORT_BACKENDS} PARENT_SCOPE)
  message(STATUS "backend ${name}: ${version}")
endfunction()

function(clip_export_left_out option name reason)
  if(CLIP_EXPORT_${option} STREQUAL "ON")
    message(FATAL_ERROR "backend ${name}: ${reason}")
  endif()
  message(STATUS "backend ${name}: left out, ${reason}")
endfunction()

# Where a Python package of the interpreter that CMake finds lies; "" where there is none.
function(clip_export_python_package module out)
  find_package(Python3 QUIET COMPONENTS Interpreter)
  set(${out} "" PARENT_SCOPE)
  if(Python3_Interpreter_FOUND)
    execute_process(COMMAND ${Python3_EXECUTABLE} -c
                    "import importlib.util as u; s = u.find_spec('${module}'); print(s.submodule_search_locations[0] if s else '')"
                    OUTPUT_VARIABLE found ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    set(${out} "${found}" PARENT_SCOPE)
  endif()
endfunction()

# OpenVINO: its own config, of the package or of Python's wheel.
if(NOT CLIP_EXPORT_OPENVINO STREQUAL "OFF")
  clip_export_python_package(openvino openvino_package)
  find_package(OpenVINO QUIET COMPONENTS Runtime HINTS ${openvino_package}/cmake)
  if(NOT OpenVINO_FOUND)
    clip_export_left_out(OPENVINO openvino "no OpenVINOConfig.cmake was found; pip install openvino, or set OpenVINO_DIR")
  elseif(OpenVINO_VERSION VERSION_LESS 2026.0)
    clip_export_left_out(OPENVINO openvino "version ${OpenVINO_VERSION} does not read Attention of opset 23; 2026.0 does")
  else()
    clip_export_found(OPENVINO openvino src/backend_openvino.cpp openvino::runtime ${OpenVINO_VERSION})
    list(APPEND CLIP_EXPORT_DEPENDENCIES "find_dependency(OpenVINO COMPONENTS Runtime HINTS \"${OpenVINO_DIR}\")")
  endif()
else()
  clip_export_left_out(OPENVINO openvino "CLIP_EXPORT_OPENVINO is OFF")
endif()

# ONNX Runtime: a package's config, or headers in ONNXRUNTIME_INCLUDE and a library, which Python's wheel has too.
if(NOT CLIP_EXPORT_ONNXRUNTIME STREQUAL "OFF")
  clip_export_python_package(onnxruntime onnxruntime_package)
  find_path(ONNXRUNTIME_INCLUDE onnxruntime_c_api.h PATH_SUFFIXES onnxruntime onnxruntime/core/session)
  if(onnxruntime_package)
    file(GLOB onnxruntime_wheel ${onnxruntime_package}/capi/libonnxruntime.so.*)
  endif()
  find_library(ONNXRUNTIME_LIBRARY onnxruntime)
  if(NOT ONNXRUNTIME_LIBRARY AND onnxruntime_wheel)
    list(GET onnxruntime_wheel 0 onnxruntime_first)
    # In the wheel the file has its whole version; the loader asks for its soname.
    set(onnxruntime_link ${CMAKE_BINARY_DIR}/onnxruntime/libonnxruntime.so.1)
    file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/onnxruntime)
    file(CREATE_LINK ${onnxruntime_first} ${onnxruntime_link} SYMBOLIC)
    set(ONNXRUNTIME_LIBRARY ${onnxruntime_link} CACHE FILEPATH "The library of ONNX Runtime" FORCE)
  endif()
  if(NOT ONNXRUNTIME_INCLUDE)
    clip_export_left_out(ONNXRUNTIME onnxruntime "no onnxruntime_c_api.h was found; set ONNXRUNTIME_INCLUDE to its folder")
  elseif(NOT ONNXRUNTIME_LIBRARY)
    clip_export_left_out(ONNXRUNTIME onnxruntime "no libonnxruntime was found; set ONNXRUNTIME_LIBRARY to its file")
  else()
    add_library(clip_export_onnxruntime INTERFACE)
    target_include_directories(clip_export_onnxruntime SYSTEM INTERFACE $<BUILD_INTERFACE:${ONNXRUNTIME_INCLUDE}>)
    set(onnxruntime_installed ${ONNXRUNTIME_LIBRARY})
    if(ONNXRUNTIME_LIBRARY STREQUAL "${CMAKE_BINARY_DIR}/onnxruntime/libonnxruntime.so.1") # the wheel's goes along
      file(REAL_PATH ${ONNXRUNTIME_LIBRARY} onnxruntime_file)
      install(FILES ${onnxruntime_file} DESTINATION ${CMAKE_INSTALL_LIBDIR} RENAME libonnxruntime.so.1)
      set(onnxruntime_installed $<INSTALL_PREFIX>/${CMAKE_INSTALL_LIBDIR}/libonnxruntime.so.1)
    endif()
    target_link_libraries(clip_export_onnxruntime INTERFACE $<BUILD_INTERFACE:${ONNXRUNTIME_LIBRARY}>
                                                            $<INSTALL_INTERFACE:${onnxruntime_installed}>)
    clip_export_found(ONNXRUNTIME onnxruntime src/backend_onnxruntime.cpp clip_export_onnxruntime ${ONNXRUNTIME_LIBRARY})
    list(APPEND exported clip_export_onnxruntime)
  endif()
else()
  clip_export_left_out(ONNXRUNTIME onnxruntime "CLIP_EXPORT_ONNXRUNTIME is OFF")
endif()

include(TensorRT)

if(NOT CLIP_EXPORT_BACKENDS)
  message(STATUS "no backend: tokenizer, preprocess and the reading of bundles are built, and nothing can be encoded")
endif()
