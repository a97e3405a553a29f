package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// Output is the -output flag.
type Output struct{ format string }

// AddTo adds the flag to a command.
func (o *Output) AddTo(c *cobra.Command) {
	o.format = "pretty"
	c.Flags().Var((*outputValue)(o), "output", "Output format: pretty or json")
}

// JSON reports whether the operator asked for JSON.
func (o *Output) JSON() bool { return o.format == "json" }

type outputValue Output

func (o *outputValue) String() string { return o.format }
func (o *outputValue) Type() string   { return "pretty|json" }
func (o *outputValue) Set(text string) error {
	if text != "pretty" && text != "json" {
		return fmt.Errorf("there are pretty and json")
	}
	o.format = text
	return nil
}

// Print writes messages as JSON, or calls pretty to write them for people.
func (o *Output) Print(c *cobra.Command, pretty func(w io.Writer) error, messages ...proto.Message) error {
	if !o.JSON() {
		return pretty(c.OutOrStdout())
	}
	return PrintProto(c.OutOrStdout(), messages...)
}

// PrintValue writes a value of the command's own making as JSON, or calls pretty.
func (o *Output) PrintValue(c *cobra.Command, pretty func(w io.Writer) error, value any) error {
	if !o.JSON() {
		return pretty(c.OutOrStdout())
	}
	return json.NewEncoder(c.OutOrStdout()).Encode(value)
}

// PrintProto writes one message as a JSON object on one line, several as an array. Field names are the
// proto's, keys are sorted, empty fields are there and absent messages are not: what scripts made
// for SPIRE's -output json expect.
func PrintProto(w io.Writer, messages ...proto.Message) error {
	values := make([]any, 0, len(messages))
	for _, m := range messages {
		text, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
		if err != nil {
			return fmt.Errorf("write JSON: %w", err)
		}
		decoder := json.NewDecoder(bytes.NewReader(text))
		decoder.UseNumber()
		var value any
		if err := decoder.Decode(&value); err != nil {
			return fmt.Errorf("write JSON: %w", err)
		}
		values = append(values, present(value))
	}
	if len(values) == 1 {
		return json.NewEncoder(w).Encode(values[0])
	}
	return json.NewEncoder(w).Encode(values)
}

// present returns a JSON value without its nulls.
func present(value any) any {
	switch v := value.(type) {
	case map[string]any:
		for key, inner := range v {
			if inner == nil {
				delete(v, key)
			} else {
				v[key] = present(inner)
			}
		}
	case []any:
		kept := make([]any, 0, len(v))
		for _, inner := range v {
			if inner != nil {
				kept = append(kept, present(inner))
			}
		}
		return kept
	}
	return value
}
