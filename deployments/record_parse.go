package deployments

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
)

// FormatLevel is the highest level of the record format that this kedge understands. A change of
// the format raises the level if an older reader would get it dangerously wrong. Records that use
// the change name the new level in Record.MinAgent.
const FormatLevel = 1

// ErrTooOld means that a record was written for a newer kedge. The reader keeps what it runs, and reports the
// error.
var ErrTooOld = errors.New("this kedge is too old for the record")

// MaxRecord bounds a record, and MaxPin a pin, in bytes.
const (
	MaxRecord = 16 << 10
	MaxPin    = 16 << 10
)

// ParseRecord parses a record: the JSON that a mirror writes, or a bare pointer that a person wrote. Unknown fields
// are ignored, so that a newer mirror can add some. The error wraps ErrTooOld if min_agent is above FormatLevel. On
// any error nodes stay as they are.
func ParseRecord(value []byte) (Record, error) {
	if len(value) > MaxRecord {
		return Record{}, fmt.Errorf("the record has %d bytes, at most %d are allowed", len(value), MaxRecord)
	}
	text := Trim(string(value))
	if text == "" {
		return Record{}, errors.New("the record is empty: want what the mirror writes, or a bare pointer")
	}
	if !strings.HasPrefix(text, "{") {
		p, err := ParsePointer(text)
		if err != nil {
			return Record{}, fmt.Errorf("the record is neither JSON nor a pointer: %w", err)
		}
		return Record{Target: p}, nil
	}
	var level struct {
		MinAgent int `json:"min_agent"`
	}
	if err := lenientJSON([]byte(text), &level); err != nil {
		return Record{}, fmt.Errorf("the record: %w", err)
	}
	if level.MinAgent > FormatLevel {
		return Record{}, fmt.Errorf("%w: the record needs format level %d, this kedge knows %d: upgrade kedge here",
			ErrTooOld, level.MinAgent, FormatLevel)
	}
	var rec Record
	if err := lenientJSON([]byte(text), &rec); err != nil {
		return Record{}, fmt.Errorf("the record: %w", err)
	}
	switch {
	case rec.Target.IsZero():
		return Record{}, errors.New(`the record has no "target"`)
	case rec.Generation < 0 || rec.Retry < 0:
		return Record{}, errors.New("the record has a negative generation or retry")
	}
	for _, name := range rec.After {
		if err := CheckSegment("unit in after", name); err != nil {
			return Record{}, fmt.Errorf("the record: %w", err)
		}
	}
	if rec.Drift != "" && rec.Drift != DriftReport && rec.Drift != DriftHeal {
		return Record{}, fmt.Errorf("the record: drift %q: want report or heal", clip(string(rec.Drift)))
	}
	if rec.Rollout != nil {
		switch rec.Rollout.Phase {
		case PhaseCanary, PhasePendingApproval, PhaseFrozen, PhaseRolling, PhasePaused, PhaseRollingBack, PhaseRolledBack:
		default:
			return Record{}, fmt.Errorf("the record: unknown phase %q of its rollout", clip(string(rec.Rollout.Phase)))
		}
	}
	return rec, nil
}

// UnmarshalJSON also reads the JSON names, the phases and the reasons of the previous version.
func (p *Progress) UnmarshalJSON(data []byte) error {
	type plain Progress
	var both struct {
		plain
		Bad     Digest       `json:"bad"`
		Healthy time.Time    `json:"healthy"`
		Borne   int          `json:"borne"`
		Over    []Superseded `json:"over"`
	}
	if err := json.Unmarshal(data, &both); err != nil {
		return err
	}
	*p = Progress(both.plain)
	if p.Failed.IsZero() {
		p.Failed = both.Bad
	}
	if p.HealthySince.IsZero() {
		p.HealthySince = both.Healthy
	}
	if p.Tolerated == 0 {
		p.Tolerated = both.Borne
	}
	if p.Superseded == nil {
		p.Superseded = both.Over
	}
	switch p.Phase {
	case "waiting":
		if p.Phase = PhasePendingApproval; p.HealthySince.IsZero() {
			p.Phase = PhaseFrozen
		}
	case "back":
		p.Phase = PhaseRollingBack
	case "halted":
		p.Phase = PhaseRolledBack
	}
	if words := string(p.Reason); strings.Contains(words, " ") {
		p.Reason, p.Message = "", words
		switch {
		case strings.HasPrefix(words, "frozen by"):
			p.Reason = ReasonFrozen
		case strings.HasPrefix(words, "its file is no longer in Git"):
			p.Reason = ReasonOrphaned
		}
	}
	return nil
}

// lenientJSON parses one JSON value that a program wrote. Unknown fields are ignored.
func lenientJSON(data []byte, to any) error {
	err := json.Unmarshal(data, to)
	if wrong := (*json.UnmarshalTypeError)(nil); errors.As(err, &wrong) &&
		wrong.Field != "" { // err's text names Go types
		return fmt.Errorf("field %q can't be a %s", wrong.Field, wrong.Value)
	}
	return err
}

// holdWord is the text of a pin by which nodes keep what they run.
const holdWord = "hold"

// ParsePin parses what a tired person types: a bare pointer; hold; or YAML or JSON. Its fields are release (a pointer
// or hold), hold, reason, by, until (see ParseUntil) and at_once. Text that is empty or doesn't parse is an error,
// never "no pin".
func ParsePin(value []byte) (Pin, error) {
	text := Trim(string(value))
	switch {
	case len(value) > MaxPin:
		return Pin{}, fmt.Errorf("the pin has %d bytes, at most %d are allowed", len(value), MaxPin)
	case text == "":
		return Pin{}, errors.New("the pin is empty: want a pointer (URL@sha256:HEX) or hold; delete the key to unpin")
	case text == holdWord:
		return Pin{Hold: true}, nil
	}
	if !looksLikeFields(text) {
		p, err := ParsePointer(text)
		if err != nil {
			return Pin{}, fmt.Errorf("the pin is neither a pointer nor hold: %w", err)
		}
		return Pin{Release: p}, nil
	}
	var pin Pin
	r := &reader{file: "pin"}
	root := r.parse([]byte(text), MaxPin)
	if root == nil {
		return Pin{}, fmt.Errorf("the pin doesn't parse: %w", r.err())
	}
	seen := r.fields(root, "the pin", map[string]func(ast.Node){
		"release": func(n ast.Node) {
			s, ok := r.text(n)
			if !ok {
				return
			}
			if s == holdWord {
				pin.Hold = true
				return
			}
			into(r, &pin.Release, ParsePointer)(n)
		},
		"hold":    into(r, &pin.Hold, asBool),
		"reason":  into(r, &pin.Reason, asText),
		"by":      into(r, &pin.By, asText),
		"until":   into(r, &pin.Until, ParseUntil),
		"at_once": into(r, &pin.AtOnce, asBool),
	})
	switch {
	case r.err() != nil:
		return Pin{}, fmt.Errorf("the pin doesn't parse: %w", r.err())
	case pin.Hold && !pin.Release.IsZero():
		return Pin{}, errors.New("the pin says both hold and a release: want one of them")
	case !pin.Hold && pin.Release.IsZero():
		if seen["hold"] != nil {
			return Pin{}, errors.New("the pin says hold: false and no release: delete the key to unpin")
		}
		return Pin{}, errors.New("the pin has no release: want a pointer, or hold")
	}
	return pin, nil
}

// looksLikeFields reports whether a text is YAML or JSON with fields, not a bare value. The first
// line that is no comment decides. It must begin with a brace, or with a name and a colon that a
// blank or the line's end follows. (A slash follows the colon of a URL.)
func looksLikeFields(text string) bool {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") || line == "---" {
			continue
		}
		name, rest, ok := strings.Cut(line, ":")
		return strings.HasPrefix(line, "{") ||
			ok && !strings.ContainsAny(name, "/@ ") && (rest == "" || rest[0] == ' ' || rest[0] == '\t')
	}
	return false
}

// ParseUntil parses the time at which a pin ends. That is RFC 3339 (2026-11-24T09:00:00Z), or a
// date and a time with a zone's name or offset (2026-11-24 09:00 Europe/Berlin, 2026-11-24 09:00
// +01:00). A time without a zone is refused, as the zones of nodes and people differ.
func ParseUntil(s string) (time.Time, error) {
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	parts := strings.Fields(s)
	if len(parts) == 3 {
		layouts := []string{"2006-01-02 15:04", "2006-01-02 15:04:05"}
		for _, layout := range layouts {
			if t, err := time.Parse(layout+" -07:00", s); err == nil {
				return t, nil
			}
			if zone, err := time.LoadLocation(parts[2]); err == nil && parts[2] != "Local" {
				if t, err := time.ParseInLocation(layout, parts[0]+" "+parts[1], zone); err == nil {
					return t, nil
				}
			}
		}
	}
	return time.Time{}, fmt.Errorf(
		"%q: want a time with its zone, as in 2026-11-24T09:00:00Z or 2026-11-24 09:00 Europe/Berlin",
		clip(s),
	)
}
