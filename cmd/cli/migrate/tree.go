package migrate

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	hclv1 "github.com/hashicorp/hcl"
	"github.com/hashicorp/hcl/hcl/ast"
	"github.com/hashicorp/hcl/hcl/token"
	"github.com/zclconf/go-cty/cty"
)

// maxFile is far more than any honest file.
const maxFile = 4 << 20

// node is a key of SPIRE's file. Labels are keys within the key, as the old syntax has them.
type node struct {
	key  string
	at   token.Pos
	kids []*node    // of an object
	part bool       // the old parser took JSON's object apart: there may be more of it
	leaf *cty.Value // of anything else
}

// child returns the first child with the key, or nil.
func (n *node) child(key string) *node {
	for _, kid := range n.kids {
		if kid.key == key {
			return kid
		}
	}
	return nil
}

// parse reads HCL as it was before version 2, or JSON, which is another way to write it.
func parse(text []byte) (top *node, err error) {
	defer func() { // the parser is old, and foreign text may be anything
		if p := recover(); p != nil {
			top, err = nil, fmt.Errorf("it cannot be parsed: %v", p)
		}
	}()
	file, err := hclv1.ParseBytes(text)
	if err != nil {
		return nil, err
	}
	list, ok := file.Node.(*ast.ObjectList)
	if !ok {
		return nil, errors.New("it has no keys")
	}
	top = new(node)
	return top, top.add(list, 0)
}

// maxDepth of objects within objects.
const maxDepth = 32

func (n *node) add(list *ast.ObjectList, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%s: more than %d objects in each other", list.Pos(), maxDepth)
	}
	for _, item := range list.Items {
		if len(item.Keys) == 0 {
			return fmt.Errorf("%s: a value without a key", item.Pos())
		}
		into := n
		for _, key := range item.Keys[:len(item.Keys)-1] {
			into = into.label(text(key.Token), key)
		}
		last := item.Keys[len(item.Keys)-1]
		if err := into.set(text(last.Token), last.Pos(), item.Val, depth); err != nil {
			return err
		}
	}
	return nil
}

// label returns the child that is a label. The old parser makes of JSON's {"a": {"b": {}, "c": {}}} two objects "a",
// which are one again here: there may be but one, as in a federation. Its JSON keys have no position, which tells.
func (n *node) label(name string, key *ast.ObjectKey) *node {
	at := key.Pos()
	part := !at.IsValid()
	if i := slices.IndexFunc(n.kids, func(kid *node) bool { return part && kid.part && kid.key == name }); i >= 0 {
		return n.kids[i]
	}
	kid := &node{key: name, at: at, part: part}
	n.kids = append(n.kids, kid)
	return kid
}

// set adds a key with its value; a list of objects is the same key several times.
func (n *node) set(key string, at token.Pos, value ast.Node, depth int) error {
	switch v := value.(type) {
	case *ast.ObjectType:
		kid := &node{key: key, at: at, kids: []*node{}}
		n.kids = append(n.kids, kid)
		return kid.add(v.List, depth+1)
	case *ast.ListType:
		objects := len(v.List) > 0
		for _, one := range v.List {
			if _, ok := one.(*ast.ObjectType); !ok {
				objects = false
			}
		}
		if objects {
			for _, one := range v.List {
				if err := n.set(key, at, one, depth+1); err != nil {
					return err
				}
			}
			return nil
		}
	}
	leaf, err := literal(value, depth)
	if err != nil {
		return fmt.Errorf("%s: %s: %w", at, key, err)
	}
	n.kids = append(n.kids, &node{key: key, at: at, leaf: &leaf})
	return nil
}

func literal(value ast.Node, depth int) (cty.Value, error) {
	if depth > maxDepth {
		return cty.NilVal, fmt.Errorf("more than %d lists and objects in each other", maxDepth)
	}
	switch v := value.(type) {
	case *ast.ObjectType: // in a list with other things, as plugins may have it
		n := new(node)
		if err := n.add(v.List, depth+1); err != nil {
			return cty.NilVal, err
		}
		return object(n.kids), nil
	case *ast.ListType:
		if len(v.List) == 0 {
			return cty.EmptyTupleVal, nil
		}
		var all []cty.Value
		for _, one := range v.List {
			each, err := literal(one, depth+1)
			if err != nil {
				return cty.NilVal, err
			}
			all = append(all, each)
		}
		return cty.TupleVal(all), nil
	case *ast.LiteralType:
		switch v.Token.Type {
		case token.NUMBER, token.FLOAT:
			return cty.ParseNumberVal(v.Token.Text)
		case token.BOOL:
			return cty.BoolVal(v.Token.Text == "true"), nil
		default:
			return cty.StringVal(text(v.Token)), nil
		}
	}
	return cty.NilVal, fmt.Errorf("a value of a kind that is not known (%T)", value)
}

// text returns what a key or a string means.
func text(t token.Token) string {
	if t.Type == token.STRING || t.Type == token.HEREDOC {
		if s, ok := t.Value().(string); ok {
			return s
		}
	}
	if s, err := strconv.Unquote(t.Text); err == nil {
		return s
	}
	return t.Text
}
