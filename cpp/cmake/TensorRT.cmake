message(STATUS "tensorrt later")
