package durable

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
)

// DamagedError says that a state file could not be parsed, and was renamed to Kept.
type DamagedError struct {
	Kept string
	Err  error
}

func (e *DamagedError) Error() string { return fmt.Sprintf("damaged, kept as %s: %v", e.Kept, e.Err) }
func (e *DamagedError) Unwrap() error { return e.Err }

// ReadState reads a JSON file of format 1. If the file doesn't parse, has another format, or is refused by check,
// ReadState renames it to end in .bad, for inspection. The error is then a *DamagedError: the program goes on without
// the state. Any other error, such as fs.ErrNotExist, leaves the file where it is. check may be nil.
func ReadState[T any](path string, check func(T) error) (state T, err error) {
	var none T
	data, err := os.ReadFile(path)
	if err != nil {
		return none, err
	}
	var format struct{ Format int }
	if err = json.Unmarshal(data, &format); err == nil && format.Format != 1 {
		err = fmt.Errorf("it has format %d, this kedge reads format 1", format.Format)
	}
	if err == nil {
		err = json.Unmarshal(data, &state)
	}
	if err == nil && check != nil {
		err = check(state)
	}
	if err == nil {
		return state, nil
	}
	kept := path + ".bad"
	if renamed := os.Rename(path, kept); renamed != nil {
		return none, errors.Join(fmt.Errorf("putting a damaged file aside: %w", renamed), err)
	}
	return none, &DamagedError{Kept: kept, Err: err}
}
