package kube

import (
	"fmt"
	"sync"

	"github.com/go-logr/logr"
	"github.com/sirupsen/logrus"
)

// klogOnce: client-go logs through one logger of the process.
var klogOnce sync.Once

// klogSink takes what client-go logs into the server's log: as Debug, since what an operator has to know is
// said by this package.
type klogSink struct{ log logrus.FieldLogger }

func (klogSink) Init(logr.RuntimeInfo) {}
func (klogSink) Enabled(int) bool      { return true }

func (s klogSink) Info(_ int, msg string, pairs ...any) {
	s.WithValues(pairs...).(klogSink).log.Debug(msg)
}

func (s klogSink) Error(err error, msg string, pairs ...any) {
	s.WithValues(pairs...).(klogSink).log.WithError(err).Debug(msg)
}

func (s klogSink) WithValues(pairs ...any) logr.LogSink {
	fields := logrus.Fields{}
	for i := 0; i+1 < len(pairs); i += 2 {
		fields[fmt.Sprint(pairs[i])] = fmt.Sprint(pairs[i+1])
	}
	return klogSink{s.log.WithFields(fields)}
}

func (s klogSink) WithName(name string) logr.LogSink {
	return klogSink{s.log.WithField("logger", name)}
}
