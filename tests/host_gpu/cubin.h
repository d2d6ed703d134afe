// What a cubin says of itself: it is an ELF file with a section .text.NAME for each kernel.
#pragma once

#include <elf.h>

#include <cstring>
#include <set>
#include <string>

namespace cubin {

constexpr int kMachineCuda = 190;

inline const Elf64_Ehdr& header(const char* image) { return *reinterpret_cast<const Elf64_Ehdr*>(image); }

inline bool is_cubin(const char* image) {
  return std::memcmp(image, ELFMAG, SELFMAG) == 0 && header(image).e_machine == kMachineCuda;
}

// The architecture it was compiled for, 87 for sm_87: it moved up by a byte with the ELF version of CUDA 13.
inline int arch(const char* image) {
  const bool is_of_cuda_13 = header(image).e_ident[EI_ABIVERSION] >= 8;
  return header(image).e_flags >> (is_of_cuda_13 ? 8 : 0) & 0xff;
}

inline std::set<std::string> entries(const char* image) {
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header(image).e_shoff);
  const char* names = image + sections[header(image).e_shstrndx].sh_offset;
  const std::string prefix = ".text.";
  std::set<std::string> found;
  for (int i = 0; i < header(image).e_shnum; ++i) {
    const std::string name = names + sections[i].sh_name;
    if (name.compare(0, prefix.size(), prefix) == 0) {
      found.insert(name.substr(prefix.size()));
    }
  }
  return found;
}

}  // namespace cubin
