// Number types of tensors, numbered as the Python side numbers them.
#pragma once

namespace ubp {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace ubp
