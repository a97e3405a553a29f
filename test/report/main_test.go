package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const stream = `{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:3: SKIPPED: Docker cannot be had: not root\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"--- SKIP: TestA (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestA","Elapsed":0}
{"Action":"output","Package":"p","Test":"TestB","Output":"noise of a passed test\n"}
{"Action":"pass","Package":"p","Test":"TestB"}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.004s\n"}
{"Action":"pass","Package":"p","Elapsed":0.004}
{"Action":"output","Package":"q","Test":"TestC","Output":"    c_test.go:9: got 1, want 2\n"}
{"Action":"fail","Package":"q","Test":"TestC"}
{"Action":"output","Package":"q","Test":"TestD","Output":"panic: boom\n"}
{"Action":"output","Package":"q","Output":"FAIL\tq\t0.004s\n"}
{"Action":"fail","Package":"q"}
{"Action":"skip","Package":"r"}
{"ImportPath":"s","Action":"build-output","Output":"s.go:1: undefined\n"}
not json
`

func TestReport(t *testing.T) {
	var out strings.Builder
	r := &run{out: &out, output: map[[2]string][]string{}}
	r.read(strings.NewReader(stream))
	path := filepath.Join(t.TempDir(), "skipped")
	if err := r.finish(path); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"ok  \tp\t0.004s\n", "got 1, want 2", "panic: boom", "FAIL\tq", "s.go:1: undefined", "not json\n",
		"skipped 1 tests:\np TestA: Docker cannot be had: not root\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("it does not print %q:\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "noise") {
		t.Errorf("it prints what a passed test wrote:\n%s", out.String())
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "p TestA: Docker cannot be had: not root\n" {
		t.Errorf("the file holds %q, %v", text, err)
	}
}
