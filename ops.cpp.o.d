/tmp/w/ops_try.o: csrc/ops.cpp csrc/layer.h csrc/arguments.h \
 csrc/kernels.h csrc/cells/gru.h csrc/cells/math.h csrc/cells/lstm.h \
 csrc/cells/norm.h csrc/cells/rnn.h csrc/cells/slstm.h \
 csrc/cells/zoneout.h csrc/tensor.h csrc/cpu_path.h csrc/cpu/isa.h \
 csrc/gates_path.h
