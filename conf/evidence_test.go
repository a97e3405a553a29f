package conf

import (
	"strings"
	"testing"
	"time"
)

func TestKeepUnused(t *testing.T) {
	const day = 24 * time.Hour
	file := func(line string) string {
		return "server {\n  trust_domain = \"example.org\"\n  data_dir = \"/var/lib/x\"\n}\nnode_attestor \"join_token\" {}\nevidence {\n  " + line + "\n}\n"
	}
	for line, want := range map[string]time.Duration{
		"": 90 * day, `keep_unused = "30d"`: 30 * day, `keep_unused = "36h"`: 36 * time.Hour, `keep_unused = "0"`: 0,
	} {
		s, err := LoadServer(write(t, "server.hcl", file(line)), judges, Options{})
		if err != nil {
			t.Errorf("%s: %v", line, err)
		} else if s.Evidence.KeepUnused != want {
			t.Errorf("%s: it is %s, want %s", line, s.Evidence.KeepUnused, want)
		}
	}
	for line, want := range map[string]string{
		`keep_unused = "1h"`: "too short", `keep_unused = "0d"`: "too short", `keep_unused = "-3d"`: "whole number of days",
		`keep_unused = "1.5d"`: "whole number of days", `keep_unused = "soon"`: "no duration",
	} {
		if _, err := LoadServer(write(t, "server.hcl", file(line)), judges, Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", line, err)
		}
	}
}
