package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"kedge/deployments"
	"kedge/deployments/fuzzlimit"
)

// Whatever a commit bears as its OpenPGP signature, it is not one over what its key never signed.
func FuzzPGPSignature(f *testing.F) {
	key, err := openpgp.NewEntity("Ada", "", "ada@example.com", &packet.Config{Algorithm: packet.PubKeyAlgoEdDSA})
	if err != nil {
		f.Fatal(err)
	}
	var public, signature bytes.Buffer
	w, err := armor.Encode(&public, openpgp.PublicKeyType, nil)
	if err == nil {
		err = errors.Join(key.Serialize(w), w.Close())
	}
	if err == nil {
		err = openpgp.ArmoredDetachSign(&signature, key, strings.NewReader("x"), nil)
	}
	if err != nil {
		f.Fatal(err)
	}
	keys, err := ParseKeyring(public.Bytes())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(signature.Bytes())
	f.Add(signature.Bytes()[:80])
	f.Fuzz(func(t *testing.T, signature []byte) {
		fuzzlimit.Run(t, signature, func() {
			if who, err := keys.VerifyCommit([]byte("y"), signature, time.Now()); err == nil || !errors.Is(err, ErrUntrusted) {
				t.Errorf("%q signed what it never saw, or %v", who, err)
			}
		})
	})
}

// Whatever stands in KV as a record, as nodes' reports, as a pin and as an order: the mirror makes a record of it that
// every reader takes, and nodes decide something.
func FuzzNext(f *testing.F) {
	pointer := func(name string) string { return "s3://b/" + name + "/manifest.yaml@sha256:" + strings.Repeat("a", 64) }
	f.Add(
		[]byte(
			`{"target":"`+pointer(
				"1",
			)+`","stable":"`+pointer(
				"2",
			)+`","generation":3,"rollout":{"phase":"rolling","cutoff":"9","since":"2026-01-01T00:00:00Z"}}`,
		),
		[]byte(
			`{"node":"a","started":"2026-01-01T00:00:00Z","units":{"app":{"state":"converged","running":"`+pointer(
				"1",
			)+`","generation":3,"since":"2026-01-01T00:00:00Z"}}}`,
		),
		[]byte("hold"),
		"abort",
		true,
	)
	f.Add(
		[]byte(pointer("1")),
		[]byte(`{"units":{"app":{"state":"quarantined","quarantined":["`+strings.Repeat("a", 64)+`"]}}}`),
		[]byte(pointer("3")),
		"retry",
		false,
	)
	f.Add([]byte("no record"), []byte("{}"), []byte("no pin"), "retry", true) // nothing parses
	f.Fuzz(func(t *testing.T, record, report, pin []byte, order string, rollout bool) {
		r, err := deployments.ParseRecord(record)
		if err != nil {
			r = deployments.Record{}
		}
		said, _ := deployments.ParseReport(report)
		p, err := deployments.ParsePin(pin)
		value := &Value[deployments.Pin]{Present: len(pin) > 0, Value: p, Err: err}
		id := deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}
		release, err := deployments.ParsePointer(pointer("1"))
		if err != nil {
			t.Fatal(err)
		}
		unit := deployments.Unit{ID: id, Release: release}
		if rollout {
			unit.Rollout = &deployments.Rollout{Canary: deployments.Amount{N: 1}, MaxUnavailable: deployments.Amount{N: 1},
				Deadline: time.Hour, OnFailure: deployments.Rollback, Approval: deployments.Manual}
		}
		nodes := []Node{{Name: "a", Report: said.Units["app"]}, {Name: "b", Gone: true}}
		fuzzlimit.Run(t, []string{string(record), string(report), string(pin), order}, func() {
			move := Next(
				Situation{
					Now:    noon,
					Unit:   unit,
					Commit: strings.Repeat("c", 40),
					Record: r,
					Nodes:  nodes,
					Pin:    value,
					Order:  order,
				},
			)
			next := Base{Record: r, Floor: r.Generation}.WithGeneration(move.Record, nil, nodes)
			written, err := json.Marshal(next)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := deployments.ParseRecord(written); err != nil && len(record) < deployments.MaxRecord/2 {
				t.Errorf("%q leads to the record %s, which doesn't parse: %v", record, written, err)
			}
			for _, name := range []string{"a", "b"} {
				decision := Resolve(
					ResolveInputs{
						Unit:    id,
						Node:    name,
						Record:  Value[deployments.Record]{Present: true, Value: next},
						UnitPin: *value,
						Running: said.Units["app"].Running,
					},
				)
				if decision.Action == "" {
					t.Errorf("%q leads to no decision: %+v", record, decision)
				}
			}
		})
	})
}
