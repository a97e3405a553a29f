package plugin

import (
	"bytes"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
)

func FuzzGreeting(f *testing.F) {
	for _, line := range []string{"1|1|unix|/tmp/plugin1|grpc|\n", "1|1|unix|/s|grpc||true", "1|1|tcp|127.0.0.1:1|grpc", "", "||||", "1|1|unix||grpc"} {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		socket, err := parseGreeting(line)
		if err == nil && !strings.Contains(line, "|unix|"+socket+"|grpc") {
			t.Errorf("%q led to %q", line, socket)
		}
	})
}

func FuzzField(f *testing.F) {
	f.Add(*connInfo(1, "/tmp/s"))
	f.Add([]byte{0x08, 0x01, 0x12, 0x02, 'h', 'i'})
	f.Add([]byte{0x12, 0xff})
	f.Fuzz(func(t *testing.T, message []byte) {
		if value := field(message, 2); len(value) > len(message) {
			t.Error("longer than all of it")
		}
	})
}

func FuzzLog(f *testing.F) {
	f.Add([]byte(`{"@level":"info","@message":"hello","a":1}` + "\n"))
	f.Add([]byte("plain\n{\n" + strings.Repeat("x", 70_000) + "\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		var out bytes.Buffer
		log := logrus.New()
		log.SetOutput(&out)
		log.SetLevel(logrus.DebugLevel)
		logLines(bytes.NewReader(text), log)
		if bytes.Count(out.Bytes(), []byte("\n")) > lineBurst+lineRate*60 {
			t.Errorf("%d bytes became %d", len(text), out.Len())
		}
	})
}

func TestLog(t *testing.T) {
	var out bytes.Buffer
	log := logrus.New()
	log.SetOutput(&out)
	text := `{"@level":"error","@message":"oh","password":"x` + strings.Repeat("y", 2000) + `"}` + "\n" + strings.Repeat("more\n", 10_000)
	logLines(strings.NewReader(text), log)
	got := out.String()
	if !strings.Contains(got, "level=error msg=oh plugin_password=\"xyyy") || len(got) > 200_000 {
		t.Errorf("%d bytes: %.600s", len(got), got)
	}
	if n := strings.Count(got, "msg=more"); n < lineBurst-10 || n > 5000 {
		t.Errorf("%d lines of 10,000 were logged", n)
	}
}
