// Package migrate reads the configuration files of SPIRE's server and agent, in HCL or JSON, and writes ours.
// Nothing is lost in silence: every key that has no counterpart, or another meaning, is told with its place.
//
// Which keys there are is read off the structs that package conf and the attestors decode a file into, so a
// key that Assay learns is taken over from that day on.
//
// Why it is so: SPIRE reads version 1 of HCL, in which a label, an object within an object and an element of
// a list are the same thing. The file becomes a plain tree first, and what is a block and what an attribute
// is our own shape's to say.
package migrate

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/hcl/token"
	"github.com/hashicorp/hcl/v2/hclwrite"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/external"
)

// Remark is something that the operator has to know.
type Remark struct {
	// Line and Column are the place in SPIRE's file; 0: it is about none.
	Line   int    `json:"line,omitempty"`
	Column int    `json:"column,omitempty"`
	Key    string `json:"key"`
	// Dropped says that nothing of the key is in the result.
	Dropped bool   `json:"dropped"`
	Text    string `json:"text"`
}

// Result is our file and what is to be said about it.
type Result struct {
	Config  []byte
	Remarks []Remark
}

// Shape is what our file may have.
type Shape struct {
	// File is the struct that the whole file is decoded into.
	File reflect.Type
	// Plugins are, by the name of our block, the kinds there are, each with what makes its configuration.
	Plugins map[string]map[string]func() any
	// ExpandEnv says that $NAME and ${NAME} are environment variables, in SPIRE's file and in ours.
	ExpandEnv bool
}

// side is what differs between server and agent.
type side struct {
	block   string            // "server" or "agent"
	roles   map[string]string // SPIRE's kinds of plugins to our blocks
	aliases map[string]string // keys of the block that have another name here
	advice  map[string]string // what to say about keys that have no counterpart, by path
	changes map[string]change // keys whose value may need another form or a word of warning
	missing []missing
	// turnedOn are keys of plugins, by path, that are off unless they are set, and that SPIRE has always on.
	turnedOn map[string]string
}

// change returns another value for a key, and what to say about it, if anything.
type change func(value cty.Value) (cty.Value, string)

// missing is a key whose default is SPIRE's own.
type missing struct {
	key, value, why string
}

// migration is one run.
type migration struct {
	side
	shape   Shape
	remarks []Remark
}

// Server migrates a file of spire-server.
func Server(path string, shape Shape) (*Result, error) { return run(path, shape, serverSide) }

// Agent migrates a file of spire-agent.
func Agent(path string, shape Shape) (*Result, error) { return run(path, shape, agentSide) }

func run(path string, shape Shape, s side) (*Result, error) {
	text, err := attestor.ReadFile(path, maxFile)
	if err != nil {
		return nil, fmt.Errorf("read SPIRE's configuration: %w", err)
	}
	top, err := parse(text)
	if err != nil {
		return nil, fmt.Errorf("read SPIRE's configuration %s: %w", path, err)
	}
	if top.child(s.block) == nil {
		return nil, fmt.Errorf("read SPIRE's configuration %s: it has no %s block; is it a file of spire-%s?", path, s.block, s.block)
	}
	m := &migration{side: s, shape: shape}
	out := hclwrite.NewEmptyFile()
	m.file(out.Body(), top)
	slices.SortStableFunc(m.remarks, func(a, b Remark) int { return 100_000*(a.Line-b.Line) + a.Column - b.Column })
	config := fmt.Appendf(nil, "# Made of %s by \"assay-%s migrate\".\n\n", filepath.Base(path), s.block)
	return &Result{Config: append(config, hclwrite.Format(out.Bytes())...), Remarks: m.remarks}, nil
}

func (m *migration) say(at token.Pos, key string, dropped bool, format string, args ...any) {
	m.remarks = append(m.remarks, Remark{Line: at.Line, Column: at.Column, Key: key, Dropped: dropped, Text: fmt.Sprintf(format, args...)})
}

// drop tells about a key that is not taken over.
func (m *migration) drop(n *node, path string) {
	advice := m.advice[path]
	if advice == "" {
		advice = "There is no counterpart."
	}
	m.say(n.at, path, true, "%s", advice)
}

// file writes the blocks of the top level. What a block of SPIRE's moves up or down to is known here.
func (m *migration) file(out *hclwrite.Body, top *node) {
	for _, n := range top.kids {
		switch n.key {
		case m.block:
			m.daemon(out.AppendNewBlock(m.block, nil).Body(), n)
			out.AppendNewline()
		case "plugins":
			for _, role := range n.kids {
				for _, plugin := range role.kids {
					m.plugin(out, role.key, plugin)
				}
			}
		case "health_checks":
			m.block1(out, "health_checks", n)
		case "telemetry":
			m.telemetry(out, n)
		default:
			m.drop(n, n.key)
		}
	}
}

// block1 writes a block of the top level that is ours by the same name.
func (m *migration) block1(out *hclwrite.Body, name string, n *node) {
	field, ok := tagged(m.shape.File, name)
	if !ok {
		m.drop(n, name)
		return
	}
	m.body(out.AppendNewBlock(name, nil).Body(), elem(field.Type), n.kids, name)
	out.AppendNewline()
}

// daemon writes the server or agent block; what SPIRE calls experimental is a plain key of it.
func (m *migration) daemon(out *hclwrite.Body, n *node) {
	field, _ := tagged(m.shape.File, m.block)
	t := elem(field.Type)
	kids := slices.DeleteFunc(slices.Clone(n.kids), func(kid *node) bool { return kid.key == "experimental" })
	for i, kid := range kids {
		if alias, ok := m.aliases[kid.key]; ok {
			again := *kid
			again.key = alias
			kids[i] = &again
		}
	}
	m.body(out, t, kids, m.block)
	for _, kid := range n.kids {
		if kid.key != "experimental" {
			continue
		}
		for _, x := range kid.kids {
			if x.key == "broker" && m.block == "agent" {
				m.broker(out, x)
			} else if _, known := tagged(t, x.key); known {
				m.body(out, t, []*node{x}, m.block)
			} else {
				m.drop(x, m.block+".experimental."+x.key)
			}
		}
	}
	for _, one := range m.missing {
		if n.child(one.key) == nil {
			out.SetAttributeValue(one.key, cty.StringVal(one.value))
			m.say(token.Pos{}, m.block+"."+one.key, false, "SPIRE's default %q is written out: %s.", one.value, one.why)
		}
	}
}

// plugin writes a block of its own for what is plugins { Role "name" { … } } there.
func (m *migration) plugin(out *hclwrite.Body, role string, n *node) {
	path := "plugins." + role + "." + n.key
	block, ok := m.roles[role]
	if !ok {
		m.drop(n, "plugins."+role)
		return
	}
	if on := n.child("enabled"); on != nil && on.leaf != nil && on.leaf.Type() == cty.Bool && on.leaf.False() {
		m.say(n.at, path, true, "It is turned off there (enabled = false), so it is left out.")
		return
	}
	name := n.key
	external := n.child("plugin_cmd") != nil
	if external {
		name = "external"
	}
	kind, ok := m.shape.Plugins[block][name]
	switch {
	case !ok && external:
		m.say(n.at, path, true, "It is a program of its own, and this program runs no such %s.", strings.ReplaceAll(block, "_", " "))
		return
	case !ok:
		m.say(n.at, path, true, "This program has no %s %q; there are %s.", strings.ReplaceAll(block, "_", " "), n.key, m.kinds(block))
		return
	}
	body := out.AppendNewBlock(block, []string{name}).Body()
	t := reflect.TypeOf(kind()).Elem()
	if external {
		m.external(body, t, n, path)
	} else {
		for _, kid := range n.kids {
			switch kid.key {
			case "plugin_data":
				m.body(body, t, kid.kids, path)
			case "enabled":
			default:
				m.drop(kid, path+"."+kid.key)
			}
		}
	}
	if on := m.turnedOn[path]; on != "" && !external {
		body.SetAttributeValue(on, cty.True)
		m.say(n.at, path+"."+on, false, "SPIRE always does that, so it is turned on.")
	}
	out.AppendNewline()
	if advice := m.advice["+"+path]; advice != "" {
		m.say(n.at, path, false, "%s", advice)
	}
}

// external writes a plugin that is a program of its own. Its configuration is text in its own syntax.
func (m *migration) external(out *hclwrite.Body, t reflect.Type, n *node, path string) {
	out.SetAttributeValue("name", cty.StringVal(n.key))
	for _, kid := range n.kids {
		switch kid.key {
		case "plugin_cmd", "plugin_args", "plugin_checksum":
			m.body(out, t, []*node{kid}, path)
		case "plugin_data":
			if kid.leaf != nil {
				m.say(kid.at, path+"."+kid.key, true, "It is no object; SPIRE would not take it either.")
				continue
			}
			m.text(out, "plugin_data", render(kid.kids, ""))
		case "plugin_data_file":
			if kid.leaf == nil || kid.leaf.Type() != cty.String {
				m.drop(kid, path+"."+kid.key)
				continue
			}
			data, err := attestor.ReadFile(kid.leaf.AsString(), maxFile)
			if err != nil {
				m.say(kid.at, path+"."+kid.key, true, "The file cannot be read: %s; put its text into plugin_data.", err)
				continue
			}
			out.SetAttributeValue("plugin_data", cty.StringVal(string(data))) // SPIRE expands nothing in it
			m.say(kid.at, path+"."+kid.key, false, "The file's text of now is in plugin_data.")
		case "enabled":
		default:
			m.drop(kid, path+"."+kid.key)
		}
	}
	m.checksum(out, n, path)
	identity := ""
	if m.block == "server" {
		identity = " If it asks SPIRE's IdentityProvider, it needs plugin_identity = true: it could pose as the server."
	}
	m.say(n.at, path, false, "SPIRE hands its whole environment on; here the plugin gets no variable that plugin_env does not name.%s It is run unmodified otherwise: see attestor/external/README.md.", identity)
}

// checksum pins the program where SPIRE's file does not: an empty checksum is none to SPIRE.
func (m *migration) checksum(out *hclwrite.Body, n *node, path string) {
	if sum := n.child("plugin_checksum"); sum != nil && (sum.leaf == nil || !sum.leaf.RawEquals(cty.StringVal(""))) {
		return
	}
	command := n.child("plugin_cmd")
	if command.leaf == nil || command.leaf.Type() != cty.String {
		return // it was complained about
	}
	program := command.leaf.AsString()
	if m.shape.ExpandEnv {
		program = os.ExpandEnv(program)
	}
	sum, err := external.Checksum(program)
	if err != nil {
		m.say(command.at, path+".plugin_checksum", false, "It is required here, and cannot be told: %s. Add the SHA-256 of the program.", err)
		return
	}
	out.SetAttributeValue("plugin_checksum", cty.StringVal(fmt.Sprintf("%x", sum)))
	m.say(command.at, path+".plugin_checksum", false, "It is required here, so it is the SHA-256 that %s has at this moment; compare it with what the plugin's makers say.", program)
}

// text sets a key to a text, in which variables may be left to be replaced.
func (m *migration) text(out *hclwrite.Body, key, text string) {
	if m.shape.ExpandEnv && strings.Contains(text, "${") {
		out.SetAttributeRaw(key, raw(text))
	} else {
		out.SetAttributeValue(key, cty.StringVal(text))
	}
}

// render writes keys as SPIRE's plugins read them, in the first version of HCL.
func render(kids []*node, indent string) string {
	var b strings.Builder
	for _, n := range kids {
		if n.leaf == nil {
			fmt.Fprintf(&b, "%s%s {\n%s%s}\n", indent, strconv.Quote(n.key), render(n.kids, indent+"  "), indent)
		} else {
			fmt.Fprintf(&b, "%s%s = %s\n", indent, strconv.Quote(n.key), value(*n.leaf))
		}
	}
	return b.String()
}

// value is what literal read.
func value(v cty.Value) string {
	switch {
	case v.Type() == cty.String:
		return strconv.Quote(v.AsString()) // in that version a dollar sign in a string is nothing special
	case v.Type().IsTupleType():
		var all []string
		for _, each := range v.AsValueSlice() {
			all = append(all, value(each))
		}
		return "[" + strings.Join(all, ", ") + "]"
	case v.Type().IsObjectType():
		var all []string
		for key, each := range v.AsValueMap() {
			all = append(all, strconv.Quote(key)+" = "+value(each))
		}
		slices.Sort(all)
		return "{" + strings.Join(all, ", ") + "}"
	}
	return string(hclwrite.TokensForValue(v).Bytes())
}

func (m *migration) kinds(block string) string {
	var names []string
	for name := range m.shape.Plugins[block] {
		names = append(names, strconv.Quote(name))
	}
	slices.Sort(names)
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// telemetry takes over Prometheus; the other collectors want to be sent to.
func (m *migration) telemetry(out *hclwrite.Body, n *node) {
	field, _ := tagged(m.shape.File, "telemetry")
	inner := new(node)
	for _, kid := range n.kids {
		if strings.EqualFold(kid.key, "prometheus") && kid.leaf == nil {
			again := *kid
			again.key = "prometheus"
			inner.kids = append(inner.kids, &again)
		} else {
			m.drop(kid, "telemetry."+kid.key)
		}
	}
	if len(inner.kids) > 0 {
		m.body(out.AppendNewBlock("telemetry", nil).Body(), elem(field.Type), inner.kids, "telemetry")
		out.AppendNewline()
	}
}

// body writes keys into a block whose keys are those of a struct.
func (m *migration) body(out *hclwrite.Body, t reflect.Type, kids []*node, path string) {
	for _, n := range kids {
		key := path + "." + n.key
		field, ok := tagged(t, n.key)
		if one := strings.TrimSuffix(n.key, "s"); !ok && one != n.key {
			// A map of objects there, a block for each here.
			if field, ok = tagged(t, one); ok {
				again := *n
				again.key, n = one, &again
			}
		}
		switch {
		case !ok:
			m.drop(n, key)
		case isBlock(field):
			m.inner(out, field, n, key)
		case n.leaf == nil && elem(field.Type).Kind() == reflect.Map:
			out.SetAttributeValue(n.key, object(n.kids))
		case n.leaf == nil:
			m.say(n.at, key, true, "It is an object there, and no block here; look at the sample.")
		default:
			m.attribute(out, field, n, key)
		}
	}
}

// inner writes a block within a block. Its labels are keys of the object there.
func (m *migration) inner(out *hclwrite.Body, field reflect.StructField, n *node, key string) {
	if n.leaf != nil {
		m.say(n.at, key, true, "It is a value there, and a block here; look at the sample.")
		return
	}
	t := elem(field.Type)
	if !labelled(t) {
		m.body(out.AppendNewBlock(n.key, nil).Body(), t, older(key, n.kids), key)
		return
	}
	for _, label := range n.kids {
		if label.leaf != nil {
			m.drop(label, key+"."+label.key)
			continue
		}
		m.body(out.AppendNewBlock(n.key, []string{label.key}).Body(), t, label.kids, key+"."+label.key)
	}
}

func (m *migration) attribute(out *hclwrite.Body, field reflect.StructField, n *node, key string) {
	value := *n.leaf
	if c, ok := m.changes[key]; ok {
		var word string
		if value, word = c(value); word != "" {
			m.say(n.at, key, false, "%s", word)
		}
	}
	value, err := suited(value, elem(field.Type))
	if err != nil {
		m.say(n.at, key, true, "The value does not fit: %s.", err)
		return
	}
	if m.shape.ExpandEnv && value.Type() == cty.String && strings.Contains(value.AsString(), "${") {
		out.SetAttributeRaw(n.key, raw(value.AsString()))
		return
	}
	out.SetAttributeValue(n.key, value)
}

// raw is a string whose variables are still to be replaced when the file is read.
func raw(text string) hclwrite.Tokens {
	tokens := hclwrite.TokensForValue(cty.StringVal(text))
	for _, t := range tokens {
		t.Bytes = []byte(strings.ReplaceAll(string(t.Bytes), "$${", "${"))
	}
	return tokens
}

// suited makes of a value what the field wants: SPIRE takes "8081" for a number.
func suited(value cty.Value, t reflect.Type) (cty.Value, error) {
	var want cty.Type
	switch t.Kind() {
	case reflect.String:
		want = cty.String
	case reflect.Int, reflect.Int64, reflect.Int32:
		want = cty.Number
	case reflect.Bool:
		want = cty.Bool
	case reflect.Slice:
		if value.Type().IsPrimitiveType() { // one is as good as a list of one
			value = cty.TupleVal([]cty.Value{value})
		}
		want = cty.List(cty.String)
	default:
		return value, nil
	}
	if value.Type().IsTupleType() && value.LengthInt() == 0 {
		return value, nil
	}
	got, err := convert.Convert(value, want)
	if err != nil {
		return got, errors.New("it is of another kind here")
	}
	return got, nil
}

func object(kids []*node) cty.Value {
	all := map[string]cty.Value{}
	for _, n := range kids {
		if n.leaf != nil {
			all[n.key] = *n.leaf
		} else {
			all[n.key] = object(n.kids)
		}
	}
	if len(all) == 0 {
		return cty.EmptyObjectVal
	}
	return cty.ObjectVal(all)
}

// tagged finds the field of a key.
func tagged(t reflect.Type, name string) (reflect.StructField, bool) {
	if t == nil || t.Kind() != reflect.Struct || name == "" {
		return reflect.StructField{}, false
	}
	for field := range t.Fields() {
		if tag, kind, _ := strings.Cut(field.Tag.Get("hcl"), ","); tag == name && kind != "label" {
			return field, true
		}
	}
	return reflect.StructField{}, false
}

func isBlock(field reflect.StructField) bool {
	return strings.HasSuffix(field.Tag.Get("hcl"), ",block")
}

func labelled(t reflect.Type) bool {
	if t.Kind() != reflect.Struct {
		return false
	}
	for field := range t.Fields() {
		if strings.HasSuffix(field.Tag.Get("hcl"), ",label") {
			return true
		}
	}
	return false
}

// elem looks through pointers, and through a list of structs to one of them.
func elem(t reflect.Type) reflect.Type {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice && structs(t.Elem()) {
		t = t.Elem()
	}
	return t
}

func structs(t reflect.Type) bool {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t.Kind() == reflect.Struct
}

// exists reports whether there is something at the path already.
func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
