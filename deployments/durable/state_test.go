package durable_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/deployments/durable"
)

// What can't be read as a state is put aside, whole; what could not be read at all stays where it is.
func TestReadState(t *testing.T) {
	t.Parallel()
	type state struct{ Format, N int }
	for _, c := range []struct{ name, text, says string }{
		{"good", `{"format":1,"n":7,"later":true}`, ""},
		{"cut off", `{"format":1,"n"`, "unexpected end"},
		{"empty", ``, "unexpected end"},
		{"of a later version", `{"format":2,"n":"seven"}`, "format 2, this kedge reads format 1"},
		{"of another shape", `{"format":1,"n":"seven"}`, "cannot unmarshal"},
		{"refused", `{"format":1,"n":8}`, "eight"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "state.json")
			if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := durable.ReadState(path, func(s state) error {
				if s.N == 8 {
					return errors.New("eight")
				}
				return nil
			})
			if c.says == "" {
				if err != nil || got != (state{1, 7}) {
					t.Errorf("%+v, %v", got, err)
				}
				return
			}
			var damaged *durable.DamagedError
			if !errors.As(err, &damaged) || !strings.Contains(err.Error(), c.says) || got != (state{}) {
				t.Fatalf("%+v, %v; want a damaged one: %s", got, err, c.says)
			}
			if kept, err := os.ReadFile(damaged.Kept); err != nil || string(kept) != c.text {
				t.Errorf("it kept %q, %v", kept, err)
			}
			if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the damaged file is still there: %v", err)
			}
		})
	}
	dir := t.TempDir()
	if _, err := durable.ReadState[state](filepath.Join(dir, "none"), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
	var damaged *durable.DamagedError
	if _, err := durable.ReadState[state](dir, nil); err == nil || errors.As(err, &damaged) {
		t.Errorf("what can't be read at all: %v", err)
	}
}
