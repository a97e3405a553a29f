package migrate

import (
	"github.com/hashicorp/hcl/v2/hclwrite"
	"github.com/zclconf/go-cty/cty"
)

// broker writes who may refer to workloads: a list of objects there, a block for each broker here.
func (m *migration) broker(out *hclwrite.Body, n *node) {
	const path = "agent.experimental.broker"
	body := out.AppendNewBlock("broker", nil).Body()
	for _, kid := range n.kids {
		switch {
		case (kid.key == "socket_path" || kid.key == "bind_address") && kid.leaf != nil:
			body.SetAttributeValue(kid.key, *kid.leaf)
		case kid.key == "brokers" && kid.leaf == nil:
			m.brokerAllowed(body, kid, path+".brokers")
		default:
			m.drop(kid, path+"."+kid.key)
		}
	}
}

func (m *migration) brokerAllowed(out *hclwrite.Body, n *node, path string) {
	id := n.child("id")
	if id == nil || id.leaf == nil || id.leaf.Type() != cty.String {
		m.say(n.at, path, true, "It has no id.")
		return
	}
	var local, overTCP []cty.Value
	for _, kid := range n.kids {
		switch {
		case kid.key == "id":
		case kid.key == "allowed_reference_types" && kid.leaf == nil:
			url := kid.child("type_url")
			if url == nil || url.leaf == nil || url.leaf.Type() != cty.String {
				m.say(kid.at, path+"."+kid.key, true, "It has no type_url.")
				continue
			}
			if tcp := kid.child("allow_over_tcp"); tcp != nil && tcp.leaf != nil && tcp.leaf.Type() == cty.Bool && tcp.leaf.True() {
				overTCP = append(overTCP, *url.leaf)
			} else {
				local = append(local, *url.leaf)
			}
		default:
			m.drop(kid, path+"."+kid.key)
		}
	}
	body := out.AppendNewBlock("allow", []string{id.leaf.AsString()}).Body()
	for _, list := range []struct {
		key string
		of  []cty.Value
	}{{"reference_types", local}, {"reference_types_over_tcp", overTCP}} {
		if len(list.of) > 0 {
			body.SetAttributeValue(list.key, cty.TupleVal(list.of))
		}
	}
}
