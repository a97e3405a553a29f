package conf

import (
	"fmt"
	"io/fs"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/zclconf/go-cty/cty"
	"golang.org/x/sys/unix"

	"github.com/assay-id/assay/attestor"
)

// Files says which files hold an identity, for a program that reads nothing else.
type Files struct {
	// Name is the block's label; empty in a file of its own.
	Name string
	// Selectors are what a block in the agent's file stands for; a file of its own has none.
	Selectors attestor.Set

	Dir                                       string
	Cert, Key, Bundle, CRL, JWTBundle, JWKS   string // names in Dir; empty: none
	JWTs                                      []FilesJWT
	CertMode, KeyMode, JWTMode, JWTBundleMode fs.FileMode
	Owner, Group                              *int // nil: the process's own

	SPIFFEID, Hint                                string
	IntermediatesInBundle, Federated, OmitExpired bool
	Withdrawn                                     string // "replace", "remove" or "keep"

	PIDFile        string
	Signal         unix.Signal
	Command        []string
	CommandTimeout time.Duration
}

// FilesJWT is one token file.
type FilesJWT struct {
	Audience []string
	File     string
}

// FilesClient is what the file of "assay-agent files" says: a client of any SPIFFE Workload API.
type FilesClient struct {
	Files
	// Socket is where the Workload API is: a path, or a URL as SPIFFE_ENDPOINT_SOCKET has it.
	Socket  string
	Daemon  bool
	Process []string // started once the files are there; none: nothing is
	Log     Log
	Health  Health
}

// FilesType is the type of the selectors that blocks in the agent's file stand for.
const FilesType = "files"

// filesKeys are what both kinds of file have. The names are spiffe-helper's where the meaning is the same.
type filesKeys struct {
	Dir       string    `hcl:"cert_dir,optional"`
	Cert      string    `hcl:"svid_file_name,optional"`
	Key       string    `hcl:"svid_key_file_name,optional"`
	Bundle    string    `hcl:"svid_bundle_file_name,optional"`
	CRL       string    `hcl:"crl_file_name,optional"`
	JWTs      cty.Value `hcl:"jwt_svids,optional"`
	JWTBundle string    `hcl:"jwt_bundle_file_name,optional"`
	JWKS      string    `hcl:"jwks_file_name,optional"`

	CertMode      cty.Value `hcl:"cert_file_mode,optional"`
	KeyMode       cty.Value `hcl:"key_file_mode,optional"`
	JWTMode       cty.Value `hcl:"jwt_svid_file_mode,optional"`
	JWTBundleMode cty.Value `hcl:"jwt_bundle_file_mode,optional"`
	Owner         string    `hcl:"file_owner,optional"`
	Group         string    `hcl:"file_group,optional"`

	SPIFFEID              string `hcl:"spiffe_id,optional"`
	Hint                  string `hcl:"hint,optional"`
	IntermediatesInBundle bool   `hcl:"add_intermediates_to_bundle,optional"`
	Federated             bool   `hcl:"include_federated_domains,optional"`
	OmitExpired           bool   `hcl:"omit_expired,optional"`
	Withdrawn             string `hcl:"on_withdrawal,optional"`

	PIDFile        string   `hcl:"pid_file_name,optional"`
	Signal         string   `hcl:"renew_signal,optional"`
	Command        []string `hcl:"renew_command,optional"`
	CommandTimeout string   `hcl:"renew_command_timeout,optional"`
}

// filesClientFile is the shape of a file of its own.
type filesClientFile struct {
	AgentAddress string            `hcl:"agent_address,optional"`
	Daemon       *bool             `hcl:"daemon_mode,optional"`
	Cmd          string            `hcl:"cmd,optional"`
	CmdArgs      cty.Value         `hcl:"cmd_args,optional"`
	LogLevel     string            `hcl:"log_level,optional"`
	LogFormat    string            `hcl:"log_format,optional"`
	LogFile      string            `hcl:"log_file,optional"`
	Health       *filesHealthBlock `hcl:"health_checks,block"`
	Keys         hcl.Body          `hcl:",remain"`
}

// filesHealthBlock is health_checks { … } with spiffe-helper's names.
type filesHealthBlock struct {
	Enabled   bool   `hcl:"listener_enabled,optional"`
	Address   string `hcl:"bind_address,optional"`
	Port      *int   `hcl:"bind_port,optional"`
	LivePath  string `hcl:"liveness_path,optional"`
	ReadyPath string `hcl:"readiness_path,optional"`
}

// filesHealthPort is spiffe-helper's.
const filesHealthPort = 8081

// LoadFiles reads the file of "assay-agent files" and checks all of it. The error is a Mistakes.
func LoadFiles(path string, options Options) (*FilesClient, error) {
	l, err := open(path, options, fileKind{"-config", "conf/files.hcl"})
	if err != nil {
		return nil, err
	}
	var f filesClientFile
	l.decode(&f)
	c := &FilesClient{Socket: f.AgentAddress, Daemon: f.Daemon == nil || *f.Daemon, Log: Log{
		Level: l.logLevel("log_level", f.LogLevel),
		JSON:  l.oneOf("log_format", strings.ToLower(f.LogFormat), "text", "json") == "json",
		File:  l.inFile("log_file", f.LogFile),
	}}
	if c.Socket != "" && !strings.HasPrefix(c.Socket, "tcp://") {
		c.Socket = l.socket("agent_address", c.Socket, "")
	}
	if f.Keys != nil {
		c.Files = l.files("", f.Keys)
	}
	if f.Cmd != "" {
		c.Process = append([]string{f.Cmd}, l.arguments("cmd_args", f.CmdArgs)...)
	} else if given(f.CmdArgs) {
		l.say("cmd_args", "Missing program", "cmd_args are the arguments of cmd, which is not set.")
	}
	if h := f.Health; h != nil {
		c.Health = l.health(&healthBlock{Enabled: h.Enabled, Address: h.Address, Port: h.Port, LivePath: h.LivePath, ReadyPath: h.ReadyPath}, filesHealthPort)
	}
	if err := l.mistakes(); err != nil {
		return nil, err
	}
	return c, nil
}

// filesBlock is files "NAME" { … } of the agent's file.
type filesBlock struct {
	Name  string    `hcl:"name,label"`
	Where hcl.Range `hcl:",def_range"`
	Keys  hcl.Body  `hcl:",remain"`
}

// filesBlocks reads the blocks of the agent's file. Each stands for the selector files:name:NAME.
func (l *loader) filesBlocks(blocks []filesBlock) []Files {
	var all []Files
	seen := map[string]bool{}
	owned := map[string]string{}
	for _, b := range blocks {
		at := func(summary, format string, args ...any) {
			l.wrong = append(l.wrong, Mistake{Where: b.Where.String(), Summary: summary, Detail: fmt.Sprintf(format, args...), order: b.Where.Start.Byte})
		}
		selector := attestor.Selector{Type: FilesType, Value: "name:" + b.Name}
		switch {
		case b.Name == "" || strings.ContainsAny(b.Name, "/: \t\n") || selector.Check() != nil:
			at("Invalid name", "%q does not do as a name: entries demand it as the selector %s:name:NAME; use letters, digits, dots and dashes.", b.Name, FilesType)
			continue
		case seen[b.Name]:
			at("Duplicate files block", "There are two blocks files %q; the name is what tells their identities apart.", b.Name)
			continue
		}
		seen[b.Name] = true
		f := l.files("files."+b.Name+".", b.Keys)
		f.Name, f.Selectors = b.Name, attestor.NewSet(selector)
		for _, name := range f.names() {
			path := filepath.Join(f.Dir, name)
			if other := owned[path]; other != "" {
				at("Conflicting files", "%s is written by the block files %q too.", path, other)
			}
			owned[path] = b.Name
		}
		all = append(all, f)
	}
	return all
}

func (f *Files) names() []string {
	names := []string{f.Cert, f.Key, f.Bundle, f.CRL, f.JWTBundle, f.JWKS}
	for _, j := range f.JWTs {
		names = append(names, j.File)
	}
	return slices.DeleteFunc(names, func(n string) bool { return n == "" })
}

// files reads the keys that both kinds of file have. at is the path of their block, with a dot.
func (l *loader) files(at string, body hcl.Body) Files {
	var k filesKeys
	before := len(l.wrong)
	l.add(gohcl.DecodeBody(body, nil, &k))
	broken := len(l.wrong) > before
	f := Files{
		Dir:  l.directory(at+"cert_dir", k.Dir, "it names the directory of the files"),
		Cert: l.fileName(at+"svid_file_name", k.Cert), Key: l.fileName(at+"svid_key_file_name", k.Key),
		Bundle: l.fileName(at+"svid_bundle_file_name", k.Bundle), CRL: l.fileName(at+"crl_file_name", k.CRL),
		JWTBundle: l.fileName(at+"jwt_bundle_file_name", k.JWTBundle), JWKS: l.fileName(at+"jwks_file_name", k.JWKS),
		JWTs:     l.jwts(at+"jwt_svids", k.JWTs),
		CertMode: l.mode(at+"cert_file_mode", k.CertMode, 0o644), KeyMode: l.mode(at+"key_file_mode", k.KeyMode, 0o600),
		JWTMode: l.mode(at+"jwt_svid_file_mode", k.JWTMode, 0o600), JWTBundleMode: l.mode(at+"jwt_bundle_file_mode", k.JWTBundleMode, 0o600),
		SPIFFEID: k.SPIFFEID, Hint: k.Hint,
		IntermediatesInBundle: k.IntermediatesInBundle, Federated: k.Federated, OmitExpired: k.OmitExpired,
		Withdrawn: l.oneOf(at+"on_withdrawal", k.Withdrawn, "replace", "remove", "keep"),
		Command:   k.Command, CommandTimeout: l.duration(at+"renew_command_timeout", k.CommandTimeout, 30*time.Second, time.Second),
		Signal: l.signal(at+"renew_signal", k.Signal),
	}
	if k.PIDFile != "" {
		f.PIDFile = absolute(k.PIDFile)
	}
	f.Owner = l.account(at+"file_owner", k.Owner, "user", func(name string) (string, error) {
		u, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return u.Uid, nil
	})
	f.Group = l.account(at+"file_group", k.Group, "group", func(name string) (string, error) {
		g, err := user.LookupGroup(name)
		if err != nil {
			return "", err
		}
		return g.Gid, nil
	})
	if k.SPIFFEID != "" {
		if _, err := spiffeid.FromString(k.SPIFFEID); err != nil {
			l.say(at+"spiffe_id", "Invalid SPIFFE ID", "%q is no SPIFFE ID: %s.", k.SPIFFEID, err)
		}
	}
	if len(k.Command) > 0 && k.Command[0] == "" {
		l.say(at+"renew_command", "Missing program", "The first element of renew_command is the program to run.")
	}
	l.namesOf(at, &f, broken)
	return f
}

// namesOf checks that there is a file at all, that none is named twice, and that a certificate has its key.
func (l *loader) namesOf(at string, f *Files, broken bool) {
	names := f.names()
	if len(names) == 0 && !broken {
		l.say(at+"cert_dir", "Missing files", "No file is asked for; name at least one of svid_file_name, svid_bundle_file_name, jwt_svids, jwks_file_name and jwt_bundle_file_name.")
	}
	if (f.Cert == "") != (f.Key == "") && !broken {
		l.say(at+"svid_file_name", "Missing file name", "A certificate is of no use without its key: set both svid_file_name and svid_key_file_name, or none.")
	}
	slices.Sort(names)
	for n := 1; n < len(names); n++ {
		if names[n] == names[n-1] {
			l.say(at+"cert_dir", "Conflicting files", "Two files have the name %q.", names[n])
		}
	}
}

// fileName checks the name of a file in cert_dir.
func (l *loader) fileName(key, name string) string {
	if name != "" && (name != filepath.Base(name) || strings.HasPrefix(name, ".") || len(name) > 200) {
		l.say(key, "Invalid file name", "%q is no name of a file in cert_dir: it has no slash and does not begin with a dot.", name)
	}
	return name
}

func given(v cty.Value) bool { return v != cty.NilVal && !v.IsNull() }

// mode reads the mode of a file. The digits are octal however they are written, as chmod's are: HCL itself
// takes 0644 for six hundred and forty-four.
func (l *loader) mode(key string, v cty.Value, byDefault fs.FileMode) fs.FileMode {
	if !given(v) {
		return byDefault
	}
	var digits string
	switch {
	case !v.IsWhollyKnown():
	case v.Type() == cty.String:
		digits = v.AsString()
	case v.Type() == cty.Number:
		digits = v.AsBigFloat().Text('f', -1)
	}
	n, err := strconv.ParseUint(digits, 8, 32)
	switch {
	case err != nil || n == 0 || n > 0o777:
		l.say(key, "Invalid mode", "It is no mode of a file; write it as chmod has it, as in \"0640\".")
		return byDefault
	case n&0o400 == 0:
		l.say(key, "Invalid mode", "With it not even the owner could read the file.")
	case n&0o111 != 0:
		l.say(key, "Invalid mode", "With it the file would be a program; leave out the digits that are odd.")
	}
	return fs.FileMode(n)
}

// account returns the number of a user or a group.
func (l *loader) account(key, name, what string, look func(string) (string, error)) *int {
	if name == "" {
		return nil
	}
	text := name
	if _, err := strconv.Atoi(name); err != nil {
		if text, err = look(name); err != nil {
			l.say(key, "Unknown "+what, "There is no %s %q on this machine; name one, or write its number.", what, name)
			return nil
		}
	}
	id, err := strconv.Atoi(text)
	if err != nil || id < 0 {
		l.say(key, "Unknown "+what, "%q is no %s.", name, what)
		return nil
	}
	return &id
}

// signal reads a signal's name, with or without SIG; the default is SIGHUP.
func (l *loader) signal(key, name string) unix.Signal {
	if name == "" {
		return unix.SIGHUP
	}
	full := strings.ToUpper(name)
	if !strings.HasPrefix(full, "SIG") {
		full = "SIG" + full
	}
	s := unix.SignalNum(full)
	switch s {
	case 0:
		l.say(key, "Unknown signal", "%q is no signal; write it as in \"SIGHUP\".", name)
	case unix.SIGKILL, unix.SIGSTOP:
		l.say(key, "Unsuitable signal", "%s reloads nothing.", full)
	}
	return s
}

// arguments reads a list of texts, or one text as spiffe-helper has it: split at spaces, but for what is in
// double quotes.
func (l *loader) arguments(key string, v cty.Value) []string {
	if !given(v) {
		return nil
	}
	if v.Type() == cty.String && v.IsKnown() {
		args, err := splitArguments(v.AsString())
		if err != nil {
			l.say(key, "Invalid arguments", "%s.", err)
		}
		return args
	}
	args, ok := texts(v)
	if !ok {
		l.say(key, "Invalid arguments", "They are a list of texts, as in [\"-c\", \"reload\"].")
	}
	return args
}

// texts reads a list of texts.
func texts(v cty.Value) ([]string, bool) {
	if !v.IsWhollyKnown() || !v.CanIterateElements() || v.Type().IsObjectType() || v.Type().IsMapType() {
		return nil, false
	}
	var out []string
	for _, one := range v.AsValueSlice() {
		if one.IsNull() || one.Type() != cty.String {
			return nil, false
		}
		out = append(out, one.AsString())
	}
	return out, true
}

func splitArguments(text string) ([]string, error) {
	var args []string
	var arg strings.Builder
	quotedPart, any := false, false
	for n := 0; n < len(text); n++ {
		switch c := text[n]; {
		case c == '"' && quotedPart && n+1 < len(text) && text[n+1] == '"':
			arg.WriteByte('"')
			n++
		case c == '"':
			quotedPart, any = !quotedPart, true
		case c == ' ' && !quotedPart:
			if any {
				args = append(args, arg.String())
			}
			arg.Reset()
			any = false
		default:
			arg.WriteByte(c)
			any = true
		}
	}
	if quotedPart {
		return nil, fmt.Errorf("%q has an opening quote without a closing one", text)
	}
	if any {
		args = append(args, arg.String())
	}
	return args, nil
}

// jwts reads [{jwt_audience = "…", jwt_extra_audiences = ["…"], jwt_svid_file_name = "…"}].
func (l *loader) jwts(key string, v cty.Value) []FilesJWT {
	if !given(v) {
		return nil
	}
	const shape = `Write it as [{jwt_audience = "https://peer.example.org", jwt_svid_file_name = "token"}].`
	if !v.IsWhollyKnown() || !v.CanIterateElements() || v.Type().IsObjectType() {
		l.say(key, "Invalid value", "It is no list. "+shape)
		return nil
	}
	var out []FilesJWT
	for _, one := range v.AsValueSlice() {
		if one.IsNull() || !one.Type().IsObjectType() {
			l.say(key, "Invalid value", "An element is no object. "+shape)
			continue
		}
		var j FilesJWT
		for name, field := range one.AsValueMap() {
			var good bool
			switch name {
			case "jwt_audience":
				if good = !field.IsNull() && field.Type() == cty.String && field.AsString() != ""; good {
					j.Audience = append([]string{field.AsString()}, j.Audience...)
				}
			case "jwt_extra_audiences":
				var more []string
				more, good = texts(field)
				j.Audience = append(j.Audience, more...)
			case "jwt_svid_file_name":
				if good = !field.IsNull() && field.Type() == cty.String; good {
					j.File = l.fileName(key, field.AsString())
				}
			default:
				l.say(key, "Unsupported argument", "A token has no %q; there are jwt_audience, jwt_extra_audiences and jwt_svid_file_name.", name)
				continue
			}
			if !good {
				l.say(key, "Invalid value", "The value of %s does not do. %s", name, shape)
			}
		}
		switch {
		case len(j.Audience) == 0:
			l.say(key, "Missing audience", "A token needs jwt_audience: who is to accept it.")
		case j.File == "":
			l.say(key, "Missing file name", "A token needs jwt_svid_file_name: the file in cert_dir to write it to.")
		}
		out = append(out, j)
	}
	return out
}
