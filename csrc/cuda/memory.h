// Numbers in device memory: several to an access, and the type that they are computed in.
#pragma once

#include "../scalar.h"

namespace tangentfast {

template <int bytes> struct WordOf;
template <> struct WordOf<16> { using type = uint4; };
template <> struct WordOf<8> { using type = uint2; };
template <> struct WordOf<4> { using type = uint32_t; };
template <> struct WordOf<2> { using type = uint16_t; };

// n consecutive numbers, aligned as a whole: one access.
template <class T, int n>
struct Pack {
  T v[n];
};

template <class T, int n>
using Word = typename WordOf<n * sizeof(T)>::type;

// The word of a pack, as it comes from memory: unpacked where it is used, it takes fewer registers.
template <class T, int n>
__device__ __forceinline__ Word<T, n> load_word(const T* data) {
  return *reinterpret_cast<const Word<T, n>*>(data);
}

template <class T, int n>
__device__ __forceinline__ Pack<T, n> unpacked(const Word<T, n>& word) {
  return bit_cast<Pack<T, n>>(word);
}

template <class T, int n>
__device__ __forceinline__ void store_pack(const Pack<T, n>& pack, T* data) {
  *reinterpret_cast<Word<T, n>*>(data) = bit_cast<Word<T, n>>(pack);
}

template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };

}  // namespace tangentfast
