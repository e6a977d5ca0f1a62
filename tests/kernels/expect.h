// What the files of kernels_test share.

#pragma once

#include <cstdio>
#include <string>

inline int failures = 0;

inline void expect(bool holds, const std::string& what) {
  if (!holds) {
    std::printf("FAILED: %s\n", what.c_str());
    ++failures;
  }
}

// row_kernels_test.cpp
void test_row_kernels(bool brief);

// attention_kernels_test.cpp
void test_attention_kernels();
