package deployments

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

// Order is what an operator tells the mirror about a rollout, at control/STAGE/ROLE/UNIT. The mirror consumes it.
//
// The path of an order, such as that of kedge promote: SendOrder writes it (sync/fleet/order.go). The mirror sees it
// (sync/mirror/observe.go) and asks policy.Next for the next record, which applyOrder changes or leaves as it is
// (policy/orders.go). The mirror writes that record, if it changed, and deletes the order in one transaction
// (sync/mirror/reconcile.go). Nodes follow the record (policy/resolve.go).
type Order struct {
	Verb Verb `json:"order"`
	// By and Reason say who ordered it and why. They are kept in the history.
	By     string `json:"by,omitempty"`
	Reason string `json:"reason,omitempty"`
}

// Verb is what an order asks for.
type Verb string

const (
	VerbPromote Verb = "promote" // go past the canary, its approval, or a freeze
	VerbPause   Verb = "pause"   // stop where it is
	VerbResume  Verb = "resume"  // go on, and tolerate the failures so far
	VerbAbort   Verb = "abort"   // roll back, or pause if there is nothing to go back to
	VerbRetry   Verb = "retry"   // try again what failed
)

// Verbs returns every verb, in the order in which help and errors list them.
func Verbs() []Verb { return []Verb{VerbPromote, VerbPause, VerbResume, VerbAbort, VerbRetry} }

// MaxOrder bounds an order, in bytes.
const MaxOrder = 4 << 10

// ParseOrder parses what a person types at control/: a bare verb in any case, or YAML or JSON with order, by and
// reason.
func ParseOrder(value []byte) (Order, error) {
	text := Trim(string(value))
	switch {
	case len(value) > MaxOrder:
		return Order{}, fmt.Errorf("the order has %d bytes, at most %d are allowed", len(value), MaxOrder)
	case text == "":
		return Order{}, fmt.Errorf("the order is empty: want %s; delete the key to take it back", verbList())
	}
	if !looksLikeFields(text) {
		verb, err := asVerb(text)
		return Order{Verb: verb}, err
	}

	var o Order
	r := &reader{file: "order"}
	root := r.parse([]byte(text), MaxOrder)
	if root == nil {
		return Order{}, fmt.Errorf("the order doesn't parse: %w", r.err())
	}
	seen := r.fields(root, "the order", map[string]func(ast.Node){
		"order":  into(r, &o.Verb, asVerb),
		"by":     into(r, &o.By, asText),
		"reason": into(r, &o.Reason, asText),
	})
	switch {
	case r.err() != nil:
		return Order{}, fmt.Errorf("the order doesn't parse: %w", r.err())
	case seen["order"] == nil:
		return Order{}, errors.New(`the order lacks the field "order": want ` + verbList())
	}
	return o, nil
}

func asVerb(s string) (Verb, error) {
	verb := Verb(strings.ToLower(s))
	if !slices.Contains(Verbs(), verb) {
		return "", fmt.Errorf("%q: want %s", clip(s), verbList())
	}
	return verb, nil
}

func verbList() string {
	var words []string
	for _, v := range Verbs() {
		words = append(words, string(v))
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}
