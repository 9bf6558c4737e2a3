#pragma once

#include "emulator.h"

namespace ep::arch {

// A type of its own for each declaration that uses it.
template <class T, class Declaration>
T& shared_variable() {
  static const unsigned id = emu::new_variable();
  return *static_cast<T*>(emu::variable(id, sizeof(T)));
}

}  // namespace ep::arch

#define EP_SHARED(type, name)                                                                      \
  struct name##_declaration {};                                                                    \
  auto& name = ::ep::arch::shared_variable<type, name##_declaration>()

#define EP_DYNAMIC_SHARED(type, name) auto* name = reinterpret_cast<type*>(emu::dynamic_shared())
