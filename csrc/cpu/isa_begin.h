// What isa_*.cpp includes before it sets its target.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/dtype.h"
#include "cpu/isa.h"
