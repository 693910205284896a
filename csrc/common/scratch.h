// Working memory of a kernel: 64-byte aligned, grows and never shrinks, uninitialised.
#pragma once
#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <new>

namespace pgolf {

template <class T>
class Scratch {
 public:
  // Room for n elements; what was there before is lost if it has to grow.
  T* need(size_t n) {
    if (n > size_) {
      constexpr size_t kHugePage = size_t(2) << 20;
      const size_t align = n * sizeof(T) >= kHugePage ? kHugePage : 64;
      const size_t bytes = (n * sizeof(T) + align - 1) / align * align;
      memory_.reset(static_cast<T*>(std::aligned_alloc(align, bytes)));
      if (!memory_) throw std::bad_alloc();
      size_ = n;
      // 512 times fewer page faults; merely slower where the kernel refuses.
      if (align == kHugePage) madvise(memory_.get(), bytes, MADV_HUGEPAGE);
    }
    return memory_.get();
  }
  T* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
  size_t size_ = 0;
};

}  // namespace pgolf
