// The part of the DLPack interchange format (version 0, https://dmlc.github.io/dlpack) that hands out plain bytes.
#pragma once

#include <cstdint>

namespace gossamer {

struct DLDevice {
  int32_t type;  // 1: CPU
  int32_t id;
};

struct DLDataType {
  uint8_t code;  // 1: unsigned integer
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

}  // namespace gossamer
