package hostile

import (
	"bytes"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// spoiled is a way to spoil a message in one thing.
type spoiled struct {
	name string
	// wire returns a good message, spoiled.
	wire func(good proto.Message) []byte
	// must says that it has to be refused, whatever the method is; field is what excepts it, in
	// lenient.
	must  bool
	field string
}

// step leads from a message to one inside it: a field, and the index in it if it is a list.
type step struct {
	field protoreflect.FieldDescriptor
	index int // -1: not a list
}

// path leads from a message to one deep inside it.
type path []step

func (p path) String() string {
	var b strings.Builder
	for _, s := range p {
		fmt.Fprintf(&b, "%s.", s.field.Name())
	}
	return b.String()
}

// walk goes along the path in a message and makes what is not there.
func (p path) walk(m protoreflect.Message) protoreflect.Message {
	for _, s := range p {
		if s.index < 0 {
			m = m.Mutable(s.field).Message()
			continue
		}
		list := m.Mutable(s.field).List()
		for list.Len() <= s.index {
			list.AppendMutable()
		}
		m = list.Get(s.index).Message()
	}
	return m
}

// spoiler collects the ways to spoil a message of one type.
type spoiler struct{ out []spoiled }

const (
	many = 10_000
	huge = 1 << 20
	// placeholder stands for text that is not UTF-8 until the message is on the wire.
	placeholder = "\x01not UTF-8\x01"
)

// spoil returns all ways to spoil a message of the type: for each field every kind of bad value that
// such a field can have, and bytes that are no message at all.
func spoil(desc protoreflect.MessageDescriptor) []spoiled {
	s := &spoiler{}
	s.message(nil, desc)
	s.bytes(desc)
	return s.out
}

// marshal returns the message on the wire. Text that is to be no UTF-8 becomes so here.
func marshal(m proto.Message) []byte {
	wire, err := proto.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("marshal %s: %v", m.ProtoReflect().Descriptor().FullName(), err))
	}
	return bytes.ReplaceAll(wire, []byte(placeholder), bytes.Repeat([]byte{0xff}, len(placeholder)))
}

// deepest is how far down messages are spoiled.
const deepest = 6

func (s *spoiler) message(at path, desc protoreflect.MessageDescriptor) {
	if len(at) > deepest {
		return
	}
	if desc.FullName() == "spire.api.types.SPIFFEID" && len(at) > 0 {
		s.ids(at, desc)
	}
	for i := range desc.Fields().Len() {
		f := desc.Fields().Get(i)
		switch {
		case f.IsMap():
			s.change(at, f, "an empty key", func(m protoreflect.Message) {
				m.Mutable(f).Map().Set(f.MapKey().Default().MapKey(), m.Mutable(f).Map().NewValue())
			})
		case f.IsList():
			s.list(at, f)
		case f.Message() != nil:
			s.change(at, f, "missing", func(m protoreflect.Message) { m.Clear(f) })
			s.change(at, f, "empty", func(m protoreflect.Message) { m.Set(f, m.NewField(f)) })
			s.message(append(slices.Clip(at), step{f, -1}), f.Message())
		default:
			s.scalar(at, f)
		}
	}
}

// change adds a form in which the message at the path was changed.
func (s *spoiler) change(at path, f protoreflect.FieldDescriptor, what string, change func(protoreflect.Message)) *spoiled {
	s.out = append(s.out, spoiled{
		name: fmt.Sprintf("%s%s is %s", at, f.Name(), what), field: string(f.FullName()),
		wire: func(good proto.Message) []byte {
			m := proto.Clone(good)
			change(at.walk(m.ProtoReflect()))
			return marshal(m)
		},
	})
	return &s.out[len(s.out)-1]
}

// list spoils a repeated field.
func (s *spoiler) list(at path, f protoreflect.FieldDescriptor) {
	s.change(at, f, "empty", func(m protoreflect.Message) { m.Clear(f) })
	fill := func(m protoreflect.Message, n int) {
		list := m.Mutable(f).List()
		one := list.NewElement()
		if list.Len() > 0 {
			one = list.Get(0)
		}
		for list.Len() < n {
			list.Append(one)
		}
	}
	s.change(at, f, "twice the same", func(m protoreflect.Message) { fill(m, max(2, 2*m.Get(f).List().Len())) })
	s.change(at, f, fmt.Sprintf("%d times the same", many), func(m protoreflect.Message) {
		fill(m, many)
		if proto.Size(m.Interface()) > 3<<20 { // a request over the limit of all requests says nothing
			m.Mutable(f).List().Truncate(many * (3 << 20) / proto.Size(m.Interface()))
		}
	})
	if f.Message() != nil {
		s.change(at, f, "with an empty one", func(m protoreflect.Message) { m.Mutable(f).List().AppendMutable() })
		s.message(append(slices.Clip(at), step{f, 0}), f.Message())
		return
	}
	for _, v := range scalars(f) {
		bad := s.change(at, f, "one that is "+v.name, func(m protoreflect.Message) { m.Mutable(f).List().Append(v.value) })
		bad.must = v.must
	}
}

// scalar spoils a field with one value.
func (s *spoiler) scalar(at path, f protoreflect.FieldDescriptor) {
	for _, v := range scalars(f) {
		bad := s.change(at, f, v.name, func(m protoreflect.Message) { m.Set(f, v.value) })
		bad.must = v.must
	}
	if f.Kind() != protoreflect.BytesKind {
		return
	}
	s.change(at, f, "cut in half", func(m protoreflect.Message) {
		b := m.Get(f).Bytes()
		m.Set(f, protoreflect.ValueOfBytes(b[:len(b)/2]))
	})
	s.change(at, f, "changed in its last byte", func(m protoreflect.Message) {
		b := bytes.Clone(m.Get(f).Bytes())
		if len(b) > 0 {
			b[len(b)-1] ^= 1
		}
		m.Set(f, protoreflect.ValueOfBytes(b))
	})
}

type scalar struct {
	name  string
	value protoreflect.Value
	must  bool
}

// scalars returns bad values for a field by its kind, and by its name where names mean something.
func scalars(f protoreflect.FieldDescriptor) []scalar {
	text := protoreflect.ValueOfString
	switch f.Kind() {
	case protoreflect.StringKind:
		values := []scalar{
			{"empty", text(""), false},
			{"not UTF-8", text(placeholder), true},
			{"a MiB long", text(strings.Repeat("a", huge)), true},
			{"2049 bytes long", text(strings.Repeat("a", 2049)), false},
			{"a zero byte", text("\x00"), false},
			{"with control characters", text("a\r\n\x1b[2J\x7f"), false},
			{"with a space", text(" a b "), false},
			{"dots", text("../../etc/passwd"), false},
			{"percent signs", text("%00%2e%2e/%s%n"), false},
			{"not ASCII", text("ｅｘａｍｐｌｅ\u202e\U0001f984"), false},
			{"upper case", text("EXAMPLE.ORG"), false},
			{"a URL", text("spiffe://example.org/x?y#z"), false},
			{"a number below zero", text("-1"), false},
		}
		if f.Name() == "page_token" {
			for _, token := range []string{"garbage", "a1.", "a1.!!", "a1.AA==", "1", "-1", "a1." + strings.Repeat("A", 4000)} {
				values = append(values, scalar{fmt.Sprintf("the token %.10q", token), text(token), true})
			}
		}
		if f.Name() == "trust_domain" && f.Parent().FullName() != "spire.api.types.SPIFFEID" {
			for _, name := range []string{"Example.org", "a b", "a/b", "spiffe://", "a:80", "a..b/", strings.Repeat("a", 256), "http://a"} {
				values = append(values, scalar{fmt.Sprintf("the trust domain %.12q", name), text(name), true})
			}
		}
		return values
	case protoreflect.BytesKind:
		raw := protoreflect.ValueOfBytes
		var named []scalar
		values := badDER[string(f.Name())]
		for _, what := range slices.Sorted(maps.Keys(values)) {
			named = append(named, scalar{what, raw(values[what]), true})
		}
		return append(named, []scalar{
			{"empty", raw(nil), false},
			{"one zero", raw([]byte{0}), false},
			{"64 KiB of zeros", raw(make([]byte, 64<<10)), false},
			{"a MiB of ones", raw(bytes.Repeat([]byte{0xff}, huge)), false},
			{"an endless ASN.1 sequence", raw([]byte{0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 0x30, 0x80}), false},
			{"text", raw([]byte(`{"a":[[[[[[[[`)), false},
		}...)
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		n := protoreflect.ValueOfInt32
		return []scalar{{"-1", n(-1), true}, {"the least", n(math.MinInt32), true}, {"the most", n(math.MaxInt32), false}, {"0", n(0), false}}
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		n := protoreflect.ValueOfInt64
		return []scalar{{"-1", n(-1), true}, {"the least", n(math.MinInt64), true}, {"the most", n(math.MaxInt64), false}, {"0", n(0), false}}
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		n := protoreflect.ValueOfUint32
		return []scalar{{"the most", n(math.MaxUint32), false}, {"0", n(0), false}}
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		n := protoreflect.ValueOfUint64
		return []scalar{{"the most", n(math.MaxUint64), false}, {"0", n(0), false}}
	case protoreflect.EnumKind:
		n := protoreflect.ValueOfEnum
		values := []scalar{{"-1", n(-1), true}, {"9999", n(9999), true}}
		for i := range f.Enum().Values().Len() {
			v := f.Enum().Values().Get(i)
			values = append(values, scalar{string(v.Name()), n(v.Number()), false})
		}
		return values
	case protoreflect.BoolKind:
		n := protoreflect.ValueOfBool
		return []scalar{{"true", n(true), false}, {"false", n(false), false}}
	case protoreflect.FloatKind:
		n := protoreflect.ValueOfFloat32
		return []scalar{{"not a number", n(float32(math.NaN())), true}, {"infinite", n(float32(math.Inf(1))), true}, {"-1", n(-1), true}}
	case protoreflect.DoubleKind:
		n := protoreflect.ValueOfFloat64
		return []scalar{{"not a number", n(math.NaN()), true}, {"infinite", n(math.Inf(1)), true}, {"-1", n(-1), true}}
	}
	return nil
}

// badIDs are SPIFFE IDs that are none (SPIFFE-ID sections 2.1 to 2.4), in SPIRE's two parts.
var badIDs = []struct{ name, td, path string }{
	{"without a trust domain", "", "/w"},
	{"in a trust domain in upper case", "Example.org", "/w"},
	{"in a trust domain with a port", "example.org:80", "/w"},
	{"in a trust domain with a user", "a@example.org", "/w"},
	{"in a trust domain with a slash", "example.org/x", "/w"},
	{"in a trust domain with a space", "example org", "/w"},
	{"in a trust domain with a percent sign", "example%2eorg", "/w"},
	{"in a trust domain that is not ASCII", "exämple.org", "/w"},
	{"in a trust domain that is too long", strings.Repeat("a", 256), "/w"},
	{"in a trust domain with a scheme", "http://example.org", "/w"},
	{"in another trust domain", "other.test", "/w"},
	{"with a path without a slash", "example.org", "w"},
	{"with a trailing slash", "example.org", "/w/"},
	{"with a slash alone", "example.org", "/"},
	{"with an empty segment", "example.org", "/w//x"},
	{"with a dot segment", "example.org", "/w/./x"},
	{"with two dots", "example.org", "/w/../x"},
	{"with a percent sign", "example.org", "/w%2fx"},
	{"with a query", "example.org", "/w?x"},
	{"with a fragment", "example.org", "/w#x"},
	{"with a space", "example.org", "/w x"},
	{"with a zero byte", "example.org", "/w\x00"},
	{"that is not ASCII", "example.org", "/wörkload"},
	{"that is not UTF-8", "example.org", "/" + placeholder},
	{"of more than 2048 bytes", "example.org", "/" + strings.Repeat("a", 2048)},
}

// ids puts bad SPIFFE IDs in place of a good one.
func (s *spoiler) ids(at path, desc protoreflect.MessageDescriptor) {
	td, p := desc.Fields().ByName("trust_domain"), desc.Fields().ByName("path")
	for _, id := range badIDs {
		bad := s.change(at, p, "of an ID "+id.name, func(m protoreflect.Message) {
			m.Set(td, protoreflect.ValueOfString(id.td))
			m.Set(p, protoreflect.ValueOfString(id.path))
		})
		bad.must, bad.field = true, "spire.api.types.SPIFFEID"
	}
}

// bytes adds what is no message of the type.
func (s *spoiler) bytes(desc protoreflect.MessageDescriptor) {
	add := func(name string, must bool, tail ...byte) {
		s.out = append(s.out, spoiled{
			name: "followed by " + name, must: must, field: "bytes",
			wire: func(good proto.Message) []byte { return append(marshal(good), tail...) },
		})
	}
	s.out = append(s.out, spoiled{name: "no bytes", wire: func(proto.Message) []byte { return nil }})
	add("a tag of zero", true, 0x00, 0x00)
	add("a wire type that does not exist", true, 0x0f)
	add("an endless number", true, bytes.Repeat([]byte{0x80}, 64)...)
	add("a length beyond the end", true, 0x0a, 0xff, 0xff, 0xff, 0xff, 0x07)
	add("a group that does not end", true, 0x0b)
	add("groups 20,000 deep", true, bytes.Repeat([]byte{0xbb, 0x3e}, 20_000)...)
	var unknown []byte
	for i := range many {
		unknown = protowire.AppendTag(unknown, protowire.Number(100_000+i), protowire.VarintType)
		unknown = protowire.AppendVarint(unknown, math.MaxUint64)
	}
	add("10,000 fields nobody knows", false, unknown...)
	for i := range desc.Fields().Len() {
		f := desc.Fields().Get(i)
		if f.Kind() == protoreflect.StringKind || f.Kind() == protoreflect.BytesKind || f.Message() != nil {
			// A known field of another wire type is an unknown field to protobuf: any answer will do.
			add(fmt.Sprintf("a number as %s", f.Name()), false, protowire.AppendVarint(protowire.AppendTag(nil, f.Number(), protowire.VarintType), 1)...)
		}
		if f.Message() != nil {
			garbage := protowire.AppendBytes(protowire.AppendTag(nil, f.Number(), protowire.BytesType), []byte{0xff, 0xff, 0xff})
			add(fmt.Sprintf("garbage as %s", f.Name()), true, garbage...)
		}
	}
}

func TestEveryFieldIsSpoiled(t *testing.T) {
	desc := (&types.Entry{}).ProtoReflect().Descriptor()
	all := spoil(desc)
	names := map[string]bool{}
	for _, s := range all {
		if names[s.name] {
			t.Errorf("%q is there twice", s.name)
		}
		names[s.name] = true
		s.wire(&types.Entry{}) // does not panic
	}
	for i := range desc.Fields().Len() {
		name, found := string(desc.Fields().Get(i).Name()), false
		for _, s := range all {
			found = found || strings.HasPrefix(s.name, name+" ") || strings.HasPrefix(s.name, name+".")
		}
		if !found {
			t.Errorf("field %s is not spoiled", name)
		}
	}
	if len(all) < 200 {
		t.Errorf("an entry can be spoiled in %d ways", len(all))
	}
}
