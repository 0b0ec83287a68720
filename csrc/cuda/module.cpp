// An empty Python module: importing it loads the library, whose static initialisers register kernels.
#include <Python.h>

extern "C" PyObject* PyInit__cuda(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr,
                                          nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
