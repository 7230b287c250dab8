/* Differences between compilers and processors, as macros. */

#ifndef TD_PLATFORM_H
#define TD_PLATFORM_H

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__) && !defined(TD_PLAIN)
#define TD_X86 1
#include <immintrin.h>
#endif

#ifdef _WIN32
#define TD_EXPORT __declspec(dllexport)
#else
#define TD_EXPORT __attribute__((visibility("default")))
#endif

#if defined(__GNUC__)
#define TD_INLINE __attribute__((always_inline))
#define TD_NOINLINE __attribute__((noinline))
#define TD_PREFETCH(address, write) __builtin_prefetch(address, write)
#else
#define TD_INLINE
#define TD_NOINLINE
#define TD_PREFETCH(address, write) ((void)0)
#endif

/* TD_INDEPENDENT stands before a loop whose iterations do not depend on each other, though their addresses may be the
 * same. */
#define TD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TD_UNROLL(n) TD_PRAGMA(unroll n)
#define TD_INDEPENDENT TD_PRAGMA(clang loop vectorize(assume_safety))
#elif defined(__GNUC__)
#define TD_UNROLL(n) TD_PRAGMA(GCC unroll n)
#define TD_INDEPENDENT TD_PRAGMA(GCC ivdep)
#else
#define TD_UNROLL(n)
#define TD_INDEPENDENT
#endif

#endif
