// Groups equal ids, so that their gradients can be added before one update of the row.
#pragma once

#include <cstdint>

namespace ubp {

// Sorts positions 0 .. count - 1 by id, stable, into order [count]; writes the ascending distinct ids
// [groups] and where each group starts, [groups + 1]. Returns the number of groups. Ids must not be negative.
int64_t group_ids(const int64_t* ids, int64_t count, int64_t* order, int64_t* distinct, int64_t* start);

}  // namespace ubp
