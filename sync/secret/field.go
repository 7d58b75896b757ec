package secret

import (
	"encoding/json"
	"errors"
	"fmt"

	"kedge/deployments"
)

// pick returns a field of a source's answer, or all of raw if field is empty; null, an object and a list are errors.
// Its errors contain nothing of raw.
func pick(source, raw, field string) (string, error) {
	if field == "" {
		return raw, nil
	}
	fields, err := fieldsOf(source, raw)
	if err != nil {
		return "", err
	}
	value, ok := fields[field]
	if !ok {
		return "", fmt.Errorf("it has no field %q", field)
	}
	var text string
	if json.Unmarshal(value, &text) == nil {
		return text, nil
	}
	if string(value) == "null" || value[0] == '{' || value[0] == '[' {
		return "", fmt.Errorf("its field %q is null, an object or a list: want text, a number, true or false", field)
	}
	return string(value), nil // a number, true or false
}

func fieldsOf(source, raw string) (map[string]json.RawMessage, error) {
	var fields map[string]json.RawMessage
	if json.Unmarshal([]byte(raw), &fields) != nil || fields == nil {
		return nil, errors.New("it is no JSON object, and so has no fields")
	}
	if source != deployments.SecretVault {
		return fields, nil
	}
	return vaultFields(fields)
}
