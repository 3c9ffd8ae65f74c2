// Philox and the mixing arithmetic against published vectors and oracles in double; needs neither torch nor a test
// framework.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>

#include "../mixing.h"

using namespace mixout_fast;

namespace {

int failed_checks = 0;

#define CHECK(condition, ...)                                                                                          \
  do {                                                                                                                 \
    if (!(condition) && ++failed_checks <= 10) {                                                                       \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);                                                      \
      std::printf(__VA_ARGS__);                                                                                        \
      std::printf("\n");                                                                                               \
    }                                                                                                                  \
  } while (0)

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();

uint32_t bits_of(float value) { return bit_cast<uint32_t>(value); }

bool same_bits(double a, double b) { return bit_cast<uint64_t>(a) == bit_cast<uint64_t>(b); }

using Block = Words<uint32_t>;

bool same_words(Block a, Block b) {
  return a.word[0] == b.word[0] && a.word[1] == b.word[1] && a.word[2] == b.word[2] && a.word[3] == b.word[3];
}

// A 16-bit IEEE format, decoded and rounded by arithmetic on doubles, which hold all its values and midpoints exactly.
struct Format {
  int fraction_bits;
  int smallest_exponent; // of a normal number 2^e * 1.f

  int exponent_bits() const { return 15 - fraction_bits; }
  uint32_t special() const { return ((1u << exponent_bits()) - 1) << fraction_bits; }

  double decode(uint32_t bits) const {
    const uint32_t magnitude = bits & 0x7FFF, fraction = magnitude & ((1u << fraction_bits) - 1);
    const int exponent = static_cast<int>(magnitude >> fraction_bits);
    double value;
    if (magnitude > special()) {
      value = nan_value;
    } else if (magnitude == special()) {
      value = infinity;
    } else if (exponent == 0) {
      value = std::ldexp(fraction, smallest_exponent - fraction_bits);
    } else {
      value = std::ldexp(fraction + (1u << fraction_bits), smallest_exponent + exponent - 1 - fraction_bits);
    }
    return bits & 0x8000 ? -value : value;
  }

  uint32_t encode(double value) const {
    const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isinf(value)) {
      return sign | special();
    }
    const int exponent = value == 0 ? smallest_exponent : std::max(std::ilogb(value), smallest_exponent);
    // In units of the last place; the current rounding mode is to nearest, ties to even.
    const double units = std::nearbyint(std::ldexp(std::fabs(value), fraction_bits - exponent));
    // A fraction that rounds up to the next power of two carries into the exponent by itself.
    const int64_t magnitude =
        (static_cast<int64_t>(exponent - smallest_exponent) << fraction_bits) + std::llround(units);
    return sign | static_cast<uint32_t>(std::min<int64_t>(magnitude, special()));
  }
};

constexpr Format fp16_format{10, -14};
constexpr Format bf16_format{7, -126};

template <typename Half>
void check_narrow(const Format& format, float value) {
  const uint32_t got = narrow<Half>(value).bits;
  if (std::isnan(value)) {
    CHECK((got & 0x7FFF) > format.special(), "NaN %08x became %04x", bits_of(value), got);
  } else {
    CHECK(got == format.encode(value), "%a became %04x, not %04x", value, got, format.encode(value));
  }
}

template <typename Half>
void check_every_pattern(const Format& format) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float wide = widen(Half{static_cast<uint16_t>(bits)});
    const double expected = format.decode(bits);
    if (std::isnan(expected)) {
      CHECK(std::isnan(wide), "%04x became %a", bits, wide);
      CHECK(std::isnan(widen(narrow<Half>(wide))), "NaN %04x did not survive", bits);
    } else {
      CHECK(same_bits(wide, expected), "%04x became %a, not %a", bits, wide, expected);
      CHECK(narrow<Half>(wide).bits == bits, "%04x came back as %04x", bits, narrow<Half>(wide).bits);
    }
  }
}

// Every midpoint of neighbouring values and the floats around it, including the midpoint between the largest value and
// the next power of two, where overflow begins.
template <typename Half>
void check_ties(const Format& format) {
  for (uint32_t bits = 0; bits < format.special(); ++bits) {
    const double above =
        bits + 1 == format.special() ? std::ldexp(1, 1 - format.smallest_exponent + 1) : format.decode(bits + 1);
    const double middle = (format.decode(bits) + above) / 2;
    // The midpoint at which bf16 overflows is a float; the power of two above it is not.
    const float tie = static_cast<float>(middle);
    CHECK(static_cast<double>(tie) == middle, "%a is not a float", middle);
    CHECK(narrow<Half>(tie).bits == bits + (bits & 1), "the tie %a became %04x", tie, narrow<Half>(tie).bits);
    for (const float sign : {1.0f, -1.0f}) {
      for (const float value : {std::nextafter(tie, 0.0f), tie, std::nextafter(tie, infinity)}) {
        check_narrow<Half>(format, sign * value);
      }
    }
  }
}

// About 33 million floats of every magnitude and sign; the step is odd, so that all low bits occur.
template <typename Half>
void check_many_floats(const Format& format) {
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 129) {
    check_narrow<Half>(format, bit_cast<float>(static_cast<uint32_t>(bits)));
  }
}

void philox_known_answers() {
  const Block zeros{{0, 0, 0, 0}};
  CHECK(same_words(philox4x32_10(zeros, 0, 0), Block{{0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}}), "zeros");
  const uint32_t ones = 0xFFFFFFFF;
  CHECK(same_words(philox4x32_10(Block{{ones, ones, ones, ones}}, ones, ones),
                   Block{{0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}}),
        "ones");
  CHECK(same_words(philox4x32_10(Block{{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}}, 0xA4093822, 0x299F31D0),
                   Block{{0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}}),
        "digits of pi");
}

void mask_words_split_seed_and_group() {
  CHECK(same_words(mask_words(0, 0), Block{{0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}}), "seed 0, group 0");
  const uint64_t seed = 0x299F31D0A4093822, group = 0x85A308D3243F6A88;
  const Block expected = philox4x32_10(Block{{0x243F6A88, 0x85A308D3, 0, 0}}, 0xA4093822, 0x299F31D0);
  CHECK(same_words(mask_words(seed, group), expected), "64-bit seed and group");
}

void threshold_keeps_words_from_it_upwards() {
  const uint64_t one = uint64_t{1} << 32;
  CHECK(is_kept(0, 0), "p = 0 keeps everything");
  CHECK(!is_kept(0xFFFFFFFF, one), "p = 1 keeps nothing");
  CHECK(is_kept(0x80000000, one / 2) && !is_kept(0x7FFFFFFF, one / 2), "p = 1/2");
}

void fp16_every_pattern() { check_every_pattern<float16>(fp16_format); }
void fp16_ties() { check_ties<float16>(fp16_format); }
void fp16_many_floats() { check_many_floats<float16>(fp16_format); }
void bf16_every_pattern() { check_every_pattern<bfloat16>(bf16_format); }
void bf16_ties() { check_ties<bfloat16>(bf16_format); }
void bf16_many_floats() { check_many_floats<bfloat16>(bf16_format); }

void special_values() {
  CHECK(narrow<float16>(65504.0f).bits == 0x7BFF, "largest fp16");
  CHECK(narrow<float16>(65519.996f).bits == 0x7BFF, "just below fp16's overflow");
  CHECK(narrow<float16>(65520.0f).bits == 0x7C00, "fp16's overflow");
  CHECK(narrow<float16>(0x1p-24f).bits == 1, "smallest fp16 subnormal");
  CHECK(narrow<float16>(0x1p-25f).bits == 0, "a tie with zero");
  CHECK(narrow<float16>(0x1.000002p-25f).bits == 1, "just above a tie with zero");
  CHECK(narrow<float16>(-0x1p-149f).bits == 0x8000, "smallest fp32 subnormal, negative");
  CHECK(narrow<float16>(-infinity).bits == 0xFC00, "fp16 infinity");
  CHECK(narrow<float16>(-0.0f).bits == 0x8000 && narrow<bfloat16>(-0.0f).bits == 0x8000, "negative zero");
  CHECK(narrow<bfloat16>(std::numeric_limits<float>::max()).bits == 0x7F80, "bf16's overflow");
  CHECK(narrow<bfloat16>(0x1p-149f).bits == 0, "smallest fp32 subnormal");
  CHECK(narrow<bfloat16>(-infinity).bits == 0xFF80, "bf16 infinity");
  // A NaN whose payload stands in the bits that rounding cuts off must not become infinite.
  CHECK(std::isnan(widen(narrow<bfloat16>(bit_cast<float>(0x7F800001u)))), "bf16 NaN");
  CHECK(std::isnan(widen(narrow<float16>(bit_cast<float>(0xFF800001u)))), "fp16 NaN");
  CHECK(std::isnan(widen(narrow<bfloat16>(bit_cast<float>(0x7FFFFFFFu)))), "bf16 NaN that rounding would overflow");
}

// On AArch64, GCC up to 12 defines the macro without having the type in C++.
#if defined(__FLT16_MANT_DIG__) && (defined(__clang__) || defined(__x86_64__) || __GNUC__ >= 13)
#define MIXOUT_HAS_FLOAT16
void fp16_compiler_agrees() {
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 4097) {
    const float value = bit_cast<float>(static_cast<uint32_t>(bits));
    const uint32_t expected = bit_cast<uint16_t>(static_cast<_Float16>(value));
    const uint32_t got = narrow<float16>(value).bits;
    CHECK(got == expected || std::isnan(value), "%a became %04x, not %04x", value, got, expected);
  }
}
#endif

template <typename Compute>
void check_mixing() {
  std::mt19937_64 generator(1);
  std::normal_distribution<Compute> normal;
  for (int i = 0; i < 1000000; ++i) {
    const Compute weight = normal(generator), target = normal(generator);
    const Compute scale = static_cast<Compute>(1 / (1 - 0.999 * std::generate_canonical<double, 53>(generator)));
    CHECK(same_bits(mix_entry(target, target, scale, true), target), "W == U == %a, scale %a", target, scale);
    CHECK(same_bits(mix_entry(weight, target, scale, false), target), "dropped, U == %a", target);
    // volatile keeps the compiler from contracting the oracle as well.
    volatile Compute difference = weight - target;
    volatile Compute scaled = difference * scale;
    const Compute expected = target + scaled;
    CHECK(same_bits(mix_entry(weight, target, scale, true), expected), "W %a, U %a, scale %a", weight, target, scale);
  }
}

void mixing_fp32() { check_mixing<float>(); }
void mixing_fp64() { check_mixing<double>(); }

void mixing_special_values() {
  CHECK(mix_entry(3.0f, 1.0f, 2.0f, true) == 5.0f, "U + 2 (W - U)");
  CHECK(mix_entry(1.0f, 3.0f, 2.0f, true) == -1.0f, "U and W are not to be swapped");
  for (const float weight : {infinity, -infinity, nan_value}) {
    CHECK(mix_entry(weight, 2.0f, 10.0f, false) == 2.0f, "dropped, W == %a", weight);
    CHECK(mix_entry(1.0f, 2.0f, infinity, false) == 2.0f, "p = 1");
    CHECK(!std::isfinite(mix_entry(weight, 2.0f, 10.0f, true)), "kept, W == %a", weight);
  }
  CHECK(std::isnan(mix_entry(1.0f, nan_value, 10.0f, false)), "a dropped entry shows its target, NaN included");
}

} // namespace

int main() {
  struct Test {
    const char* name;
    void (*run)();
  };
  const Test tests[] = {
      {"philox_known_answers", philox_known_answers},
      {"mask_words_split_seed_and_group", mask_words_split_seed_and_group},
      {"threshold_keeps_words_from_it_upwards", threshold_keeps_words_from_it_upwards},
      {"fp16_every_pattern", fp16_every_pattern},
      {"fp16_ties", fp16_ties},
      {"fp16_many_floats", fp16_many_floats},
      {"bf16_every_pattern", bf16_every_pattern},
      {"bf16_ties", bf16_ties},
      {"bf16_many_floats", bf16_many_floats},
      {"special_values", special_values},
#if defined(MIXOUT_HAS_FLOAT16)
      {"fp16_compiler_agrees", fp16_compiler_agrees},
#endif
      {"mixing_fp32", mixing_fp32},
      {"mixing_fp64", mixing_fp64},
      {"mixing_special_values", mixing_special_values},
  };
  int passed = 0, failed = 0;
  for (const Test& test : tests) {
    failed_checks = 0;
    test.run();
    if (failed_checks == 0) {
      ++passed;
    } else {
      ++failed;
      std::printf("%s: %d checks failed\n", test.name, failed_checks);
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
