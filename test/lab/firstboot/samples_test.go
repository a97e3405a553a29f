package firstboot

import (
	"encoding/base64"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/assay-id/assay/test/lab"
)

func deployed(t *testing.T, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(repository, "deploy", pattern))
	if err != nil || len(found) == 0 {
		t.Fatalf("nothing fits %s: %v", pattern, err)
	}
	return found
}

func TestSamplesAreWellFormed(t *testing.T) {
	t.Run("scripts, for shellcheck", func(t *testing.T) {
		program, err := exec.LookPath("shellcheck")
		if err != nil {
			lab.Missing(t, "shellcheck", err)
		}
		var scripts []string
		for _, pattern := range []string{"hosts/*.sh", "ec2/*.sh", "vmware/*.sh", "packages/forget-cloned", "packages/*.p*inst", "packages/*.p*rm"} {
			scripts = append(scripts, deployed(t, pattern)...)
		}
		if out, err := exec.CommandContext(t.Context(), program, scripts...).CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("user data, for cloud-init", func(t *testing.T) {
		program, err := exec.LookPath("cloud-init")
		if err != nil {
			lab.Missing(t, "cloud-init", err)
		}
		for _, file := range deployed(t, "*/user-data.yaml") {
			if out, err := exec.CommandContext(t.Context(), program, "schema", "--config-file", file).CombinedOutput(); err != nil || !strings.Contains(string(out), "Valid") {
				t.Errorf("%s: %v\n%s", file, err, out)
			}
		}
	})
	t.Run("policies allow what they say and nothing else", func(t *testing.T) {
		want := map[string][]string{
			"server-assume-policy.json":  {"sts:AssumeRole"},
			"lookup-trust-policy.json":   {"sts:AssumeRole"},
			"server-policy.json":         {"ec2:DescribeInstances", "ecs:DescribeTasks", "iam:GetInstanceProfile"},
			"instance-trust-policy.json": {"sts:AssumeRole"},
		}
		files := deployed(t, "ec2/*.json")
		if len(files) != len(want) {
			t.Errorf("policies are %q", files)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var policy struct {
				Version   string
				Statement []struct {
					Sid, Effect, Action, Resource string
					Principal                     map[string]string
					Condition                     map[string]map[string]string
				}
			}
			d := json.NewDecoder(strings.NewReader(string(text)))
			d.DisallowUnknownFields()
			if err := d.Decode(&policy); err != nil || policy.Version != "2012-10-17" {
				t.Fatalf("%s: %+v, %v", file, policy, err)
			}
			var actions []string
			for _, s := range policy.Statement {
				actions = append(actions, s.Action)
				if s.Effect != "Allow" || (s.Resource == "") == (len(s.Principal) == 0) {
					t.Errorf("%s: %+v", file, s)
				}
				switch filepath.Base(file) {
				case "server-assume-policy.json":
					if !strings.HasSuffix(s.Resource, ":role/assay-lookup") {
						t.Errorf("%s: the server may assume %s", file, s.Resource)
					}
				case "lookup-trust-policy.json":
					if s.Condition["StringEquals"]["sts:ExternalId"] == "" || !strings.HasSuffix(s.Principal["AWS"], ":role/assay-server") {
						t.Errorf("%s: %v may look up, if %v", file, s.Principal, s.Condition)
					}
				default:
					if s.Action == "sts:AssumeRole" && s.Principal["Service"] != "ec2.amazonaws.com" {
						t.Errorf("%s: %v may pose as an instance", file, s.Principal)
					}
				}
			}
			slices.Sort(actions)
			if !slices.Equal(actions, want[filepath.Base(file)]) {
				t.Errorf("%s allows %q", file, actions)
			}
		}
	})
}

// recorded runs a script of deploy with a program in its path that only writes down what it is asked.
func recorded(t *testing.T, program, script string, args ...string) []string {
	t.Helper()
	dir := t.TempDir()
	said := filepath.Join(dir, "said")
	if err := os.WriteFile(filepath.Join(dir, program), []byte("#!/bin/sh\nprintf '%s\\n' \"$@\" > '"+said+"'\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(repository, "deploy", script), args...)
	cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	text, err := os.ReadFile(said)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

func TestScriptsAskTheirPrograms(t *testing.T) {
	t.Run("vSphere: guestinfo for root only, and the sample for cloud-init", func(t *testing.T) {
		asked := recorded(t, "govc", "vmware/configure-vm.sh", "/DC0/vm/shop one")
		if !slices.Equal(asked[:3], []string{"vm.change", "-vm", "/DC0/vm/shop one"}) {
			t.Errorf("asked is %q", asked)
		}
		set := map[string]string{}
		for i := 3; i+1 < len(asked); i += 2 {
			if key, value, ok := strings.Cut(asked[i+1], "="); asked[i] == "-e" && ok {
				set[key] = value
			}
		}
		sample, err := os.ReadFile(deployed(t, "vmware/user-data.yaml")[0])
		if err != nil {
			t.Fatal(err)
		}
		userData, err := base64.StdEncoding.DecodeString(set["guestinfo.userdata"])
		if err != nil || string(userData) != string(sample) || set["guestinfo.userdata.encoding"] != "base64" {
			t.Errorf("user data is %s, %v", userData, err)
		}
		metaData, err := base64.StdEncoding.DecodeString(set["guestinfo.metadata"])
		if err != nil || string(metaData) != "instance-id: shop one\nlocal-hostname: shop one\n" {
			t.Errorf("meta data is %q, %v", metaData, err)
		}
		if set["guest_rpc.rpci.auth.cmd.info-get"] != "TRUE" || set["guest_rpc.rpci.auth.cmd.info-set"] != "TRUE" {
			t.Errorf("guestinfo is for everybody: %q", set)
		}
	})
	t.Run("EC2: the second metadata service only, and not through containers", func(t *testing.T) {
		asked := strings.Join(recorded(t, "aws", "ec2/launch.sh", "ami-1", "web", "--count", "2"), " ")
		for _, want := range []string{"ec2 run-instances --image-id ami-1 ", " Name=web ", "HttpTokens=required,HttpPutResponseHopLimit=1", "/user-data.yaml --count 2"} {
			if !strings.Contains(asked, want) {
				t.Errorf("%q is not in %q", want, asked)
			}
		}
	})
}
