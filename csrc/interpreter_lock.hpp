// Calls that wait, without the interpreter's lock.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

#include <cxxabi.h>

namespace flashtrain {

// What `function` returns, called without the lock. The interpreter's end sends callers out of here, and unwinds them
// where they ask for the lock: within a destructor, such as gil_scoped_release has, that would abort the process.
template <typename Function>
auto without_interpreter_lock(const Function& function) -> decltype(function()) {
  PyThreadState* const state = PyEval_SaveThread();
  decltype(function()) result{};
  std::exception_ptr thrown;
  try {
    result = function();
  } catch (abi::__forced_unwind&) {
    throw;  // must not be held up
  } catch (...) {
    thrown = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (thrown) std::rethrow_exception(thrown);
  return result;
}

}  // namespace flashtrain
