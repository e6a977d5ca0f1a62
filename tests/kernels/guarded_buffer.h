// Memory behind which lies a page that ends the process when it is touched: masked loads cannot hide from that, as they do
// from AddressSanitizer.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <type_traits>

namespace lfm2_test {

// `count` elements that end where a page begins that cannot be read.
template <typename T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit Buffer(size_t count, T value = T()) : count_(count) {
    const size_t page = sysconf(_SC_PAGESIZE), pages = (count * sizeof(T) + page - 1) / page + 1;
    size_ = pages * page;
    memory_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* const end = static_cast<char*>(memory_) + size_ - page;
    if (memory_ == MAP_FAILED || mprotect(end, page, PROT_NONE) != 0) {
      std::abort();
    }
    data_ = reinterpret_cast<T*>(end - count * sizeof(T));
    for (size_t i = 0; i < count; ++i) {
      data_[i] = value;
    }
  }
  ~Buffer() { munmap(memory_, size_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  T* or_null() const { return count_ == 0 ? nullptr : data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) const { return data_[i]; }
  T* begin() const { return data_; }
  T* end() const { return data_ + count_; }

 private:
  size_t count_;
  size_t size_;
  void* memory_;
  T* data_;
};

}  // namespace lfm2_test
